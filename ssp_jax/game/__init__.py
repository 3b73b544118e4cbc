"""The paper: propose, verify, solve, reward; what the roles read and write, and what counts as
right.
"""

"""Does a config fit on hardware that is not here, and how long must a step take there: memory,
roofline, compilers.
"""

"""How good a model is: question sets played greedily, judged, scored, and set beside the paper."""

"""How quantities are printed: each with the same digits, wherever it stands."""


def percent(value: float) -> str:
    """A score, in percent."""
    return f"{value:.1f}"


def difference(value: float) -> str:
    """A difference of scores, in percent."""
    return f"{value:+.1f}"


def interval(low: str, high: str) -> str:
    """The ends of an interval, as they are printed alone."""
    return f"{low} to {high}"


def seconds(value: float) -> str:
    return f"{value:.1f} s"


def trained_parameters(trained: float, total: float) -> str:
    """How many parameters of a model are trained."""
    return f"{trained:,.0f} of {total:,.0f} parameters are trained ({trained / total:.1%})"

"""A number with its noun, as a person writes it."""


def counted(number: float, one: str, more: str = "") -> str:
    """1 pass, 2 passes, 0.5 passes: `more` is the plural, "" = with an s."""
    text = f"{number:,.0f}" if isinstance(number, int) or number >= 1000 else f"{number:.3g}"
    return f"{text} {one if text == '1' else more or f'{one}s'}"

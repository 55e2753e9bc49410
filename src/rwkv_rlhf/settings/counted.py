"""A number with its noun, and with what is said of so many, as a person writes it."""

ONE = {"have": "has", "had": "had", "are": "is", "were": "was"}  # verbs of several -> of one; others get an s


def counted(number: float, one: str, more: str = "") -> str:
    """1 pass, 2 passes, 0.5 passes: `more` is the plural, "" = with an s."""
    text = f"{number:,.0f}" if isinstance(number, int) or number >= 1000 else f"{number:.3g}"
    return f"{text} {one if text == '1' else more or f'{one}s'}"


def predicated(number: int, one: str, said: str) -> str:
    """1 row has `id`, 2 rows have `id`: `said` begins with the verb of several, the only one in it."""
    verb, space, rest = said.partition(" ")
    return f"{counted(number, one)} {ONE.get(verb, f'{verb}s') if number == 1 else verb}{space}{rest}"

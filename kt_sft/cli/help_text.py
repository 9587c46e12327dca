"""How the commands describe themselves."""


def sentence(text: str) -> str:
    """A help text as a description; names keep their capitals."""
    return f"{text[0].upper()}{text[1:]}."

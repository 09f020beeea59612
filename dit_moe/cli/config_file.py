"""Options from a YAML file: each key an option's name; what the command line says wins."""

from __future__ import annotations

from pathlib import Path

import typer

RECIPES = Path(__file__).parents[1] / "recipes"


def take_options_from(context: typer.Context, value: str | None) -> str | None:
    """A typer callback: make the file's values the defaults of the command's options.

    Args:
        context: of the command.
        value: path of a YAML file, or the name of one of the package's recipes.

    Raises:
        typer.BadParameter: no such file, not YAML, or a key that is no option.
    """
    if value is None:
        return None
    import yaml

    path = _find(value)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path}: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: got {type(values).__name__}, expected names of options and their values")
    values = {str(name).replace("-", "_"): setting for name, setting in values.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise typer.BadParameter(f"{path}: got {', '.join(unknown)}, expected options of `{context.info_name}`")
    context.default_map = {**(context.default_map or {}), **values}
    return value


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find(value: str) -> Path:
    if Path(value).is_file():
        return Path(value)
    if value in recipe_names():
        return RECIPES / f"{value}.yaml"
    raise typer.BadParameter(f"got {value!r}, expected a file, or a recipe's name among {', '.join(recipe_names())}")

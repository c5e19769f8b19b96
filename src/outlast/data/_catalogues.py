"""Parallel text in many languages: the message catalogues inside the packages django and wagtail (extra ``studies``)."""

from __future__ import annotations

import gettext
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from outlast.errors import MissingDataError

PACKAGES = ("django", "wagtail")


def find_catalogues() -> dict[str, Path]:
    """The folders of the packages, without importing them.

    Raises:
        MissingDataError: a package is not installed.
    """
    found: dict[str, Path] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise MissingDataError(
                f"the message catalogues of {name} are not at hand: the package is not installed; install it with: "
                'pip install "outlast[studies]"'
            )
        found[name] = Path(spec.origin).parent
    return found


def load_catalogues(languages: Iterable[str] | None = None, *, shortest: int = 4, longest: int = 160) -> dict[str, dict[str, str]]:
    """Translations of the same English messages, by language.

    Untranslated, plural and context-marked messages are left out, and those of which the original or the translation is
    shorter or longer (in characters) than asked.

    Args:
        languages: codes as the packages spell them (``"de"``, ``"pt_BR"``); None for all.
        shortest: fewest characters.
        longest: most characters.

    Returns:
        For each language a dictionary from English messages to translations.

    Raises:
        MissingDataError: a package is not installed.
        ValueError: a language that neither package has.
    """
    folders = find_catalogues()
    wanted = None if languages is None else list(languages)
    found: dict[str, dict[str, str]] = {}
    for folder in folders.values():
        for path in sorted(folder.rglob("locale/*/LC_MESSAGES/django.mo")):
            language = path.parts[-3]
            if wanted is None or language in wanted:
                with path.open("rb") as file:
                    catalogue: dict[Any, str] = cast("Any", gettext.GNUTranslations(file))._catalog
                own = found.setdefault(language, {})
                for original, translation in catalogue.items():
                    if not isinstance(original, str) or "\x04" in original:  # plural forms; a context before the message
                        continue
                    if shortest <= len(original) <= longest and shortest <= len(translation) <= longest:
                        own.setdefault(original, translation)
    unknown = [language for language in wanted or [] if language not in found]
    if unknown:
        raise ValueError(f"no catalogue of {', '.join(unknown)}; some languages: {', '.join(sorted(load_catalogues())[:12])}")
    return found if wanted is None else {language: found[language] for language in wanted}

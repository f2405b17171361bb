"""The policies that come with the package, by name: each is a file in ``assets`` with a card."""

from __future__ import annotations

from pathlib import Path

from prunevit.agents.policies.serialization import SavedModelError

ASSETS = Path(__file__).parent / "assets"
SUFFIX = ".safetensors"


def policy_names() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(file.stem for file in ASSETS.glob(f"*{SUFFIX}"))


def policy_card(name: str) -> str:
    """What is known of a policy, in Markdown: backbone, data, compute, measured figures, licence.

    Raises:
        SavedModelError: no policy has that name.
    """
    return find_policy(name).with_suffix(".md").read_text(encoding="utf-8")


def find_policy(name: str | Path) -> Path:
    """The file of a policy, which is a path or the name of one that comes with the package.

    A file that is there comes before a name.

    Raises:
        SavedModelError: there is neither such a file nor such a name.
    """
    file = Path(name)
    if file.is_file():
        return file
    if str(name) in policy_names():
        return ASSETS / f"{name}{SUFFIX}"
    raise SavedModelError(
        f"no file {name}, and no policy of that name comes with prunevit; there are: "
        f"{', '.join(policy_names())}"
    )

"""What the tests of the ViT runtime share."""

import pytest
import timm
from packaging.version import Version


@pytest.fixture(scope="module")
def build(make_vit, request):
    """Models by their name in the module's ``FAMILIES``, each made once: not to be changed. Those
    in its ``SINCE`` need at least that version of timm.
    """
    made = {}
    since = {
        family: version
        for version, families in getattr(request.module, "SINCE", {}).items()
        for family in families
    }

    def by_name(family):
        if Version(timm.__version__) < Version(since.get(family, "0")):
            pytest.skip(f"needs timm {since[family]}")
        if family not in made:
            name, kwargs = request.module.FAMILIES[family]
            made[family] = make_vit(name, **kwargs)
        return made[family]

    return by_name

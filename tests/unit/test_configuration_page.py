"""docs/configuration.md is what its command writes."""

import runpy

from training import ROOT


def test_the_page_holds_the_help_text_of_every_field():
    command = runpy.run_path(str(ROOT / "scripts/write_configuration_docs.py"))
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == command["page"]()

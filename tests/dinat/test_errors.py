"""How errors are worded."""

from dinat.errors import nearest


def test_nearest():
    known = ["dinat_mini", "dinat_tiny", "dinat_s_tiny", "resnet50", "dinat_nano"]
    assert nearest("dinat_mimi", known, count=1) == " Did you mean dinat_mini?"
    assert nearest("dinat_mimi", known).startswith(" Did you mean dinat_mini, dinat_")
    assert nearest("dinat_mimi", known).count(",") == 2
    assert nearest("swin", known) == ""

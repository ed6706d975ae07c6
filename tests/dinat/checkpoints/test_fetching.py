"""`pretrained=True` against a real server that plays hub and publisher, and everything that goes wrong there."""

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save
from timm.models import PretrainedCfg

from dinat.checkpoints import download, sources
from dinat.checkpoints.fetching import find_host, sha256_of
from dinat.errors import CheckpointError

ARCHITECTURE = dict(img_size=16, embed_dim=8, depths=(1, 2), num_heads=(1, 2), stem_stride=2)
HUB, FILE = "/shi/tiny/resolve/main/pytorch_model.bin", "/weights/tiny.pth"
WEB_PAGE = b"<!DOCTYPE html><html>Moved</html>"


def saved(state: object) -> bytes:
    """The bytes of `torch.save`."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def tiny(**options: object) -> torch.nn.Module:
    """A model of a few thousand parameters."""
    return timm.create_model("dinat_pico", num_classes=5, **(ARCHITECTURE | options))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Weights for `tiny`."""
    return {key: torch.randn_like(value) for key, value in tiny().state_dict().items()}


@pytest.fixture
def caches(tmp_path) -> dict[str, Path]:
    return {"publisher": tmp_path / "torch" / "checkpoints", "hub": tmp_path / "hub" / "models--shi--tiny"}


@pytest.fixture
def load(hub):
    """Creates the model from hub, then publisher."""

    def load(**options):
        overlay = dict(hf_hub_id="shi/tiny", url=hub.url + FILE) | options.pop("overlay", {})
        return timm.create_model(
            "dinat_pico", pretrained=True, pretrained_cfg_overlay=overlay, **(ARCHITECTURE | options)
        )

    return load


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_hub_first(hub, load, state, caches):
    hub.files = {HUB: saved(state), FILE: saved({})}
    model = load()
    assert same(model, state)
    assert model.num_classes == 5
    assert hub.bodies() == [HUB]
    record = caches["hub"] / "pytorch_model.bin.sha256"
    assert record.read_text() == f"# Hugging Face hub shi/tiny\n{sha256(hub.files[HUB])}  pytorch_model.bin\n"
    hub.log.clear()
    assert same(load(), state)
    assert not hub.log  # cached: no network


def test_safetensors_of_the_hub_first(hub, load, state):
    hub.files = {HUB.replace("pytorch_model.bin", "model.safetensors"): save(state), HUB: b""}
    assert same(load(), state)


def test_publisher_second(hub, load, state, caches, caplog):
    hub.files = {FILE: saved(state)}
    assert same(load(), state)
    assert "because of Hugging Face hub shi/tiny: 404" in caplog.text
    record = (caches["publisher"] / "tiny.pth.sha256").read_text()
    assert record == f"# {hub.url}{FILE}\n{sha256(hub.files[FILE])}  tiny.pth\n"
    hub.log.clear()
    assert same(load(), state)
    assert not hub.log
    check = ["sha256sum", "--check", "--status", "tiny.pth.sha256"]
    assert subprocess.run(check, cwd=caches["publisher"], check=False).returncode == 0


def test_publisher_s_other_address_third(hub, load, state):
    hub.files = {"/weights/dinat_s_x_1k_224.pth": saved(state)}
    assert same(load(overlay=dict(url=f"{hub.url}/weights/dinat_s_x_in1k_224.pth")), state)


def test_published_fallbacks(published):
    for name, facts in published["models"].items():
        cfg = PretrainedCfg(url=facts["checkpoint_url"], hf_hub_id=facts["hf_hub_id"])
        expected = [facts["hf_hub_id"] and f"Hugging Face hub {facts['hf_hub_id']}", facts["checkpoint_url"]]
        expected.append(facts["checkpoint_url_fallback"])
        assert list(map(str, sources(cfg))) == [place for place in expected if place], name


def test_every_failure_is_named(hub, load):
    with pytest.raises(CheckpointError) as caught:
        load(overlay=dict(url=f"{hub.url}/weights/dinat_s_x_in1k_224.pth"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "no source has the weights:"
    assert lines[1].startswith("  Hugging Face hub shi/tiny: 404")
    assert lines[2].startswith(f"  {hub.url}/weights/dinat_s_x_in1k_224.pth: ")
    assert lines[3].startswith(f"  {hub.url}/weights/dinat_s_x_1k_224.pth: ")
    assert len(lines) == 4


def test_refused_connection_is_named(hub, load, place_hub):
    place_hub("http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(CheckpointError, match=r"hub shi/tiny: .*[Cc]onnection refused"):
        load()


@pytest.fixture
def unresolved(monkeypatch) -> list[str]:
    """No host has an address but this machine; the hosts that were asked for."""
    asked, resolve = [], socket.getaddrinfo

    def getaddrinfo(host, *rest, **options):
        if host in ("127.0.0.1", "localhost"):
            return resolve(host, *rest, **options)
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_host_that_cannot_be_resolved_is_passed_over_at_once(hub, load, state, unresolved, place_hub, caplog):
    place_hub("https://hub.test/{repo_id}/{filename}")
    hub.files = {FILE: saved(state)}
    assert same(load(), state)
    assert unresolved == ["hub.test"]  # once: no attempt after the first
    (warning,) = [record.message for record in caplog.records]
    assert "because of Hugging Face hub shi/tiny: the host hub.test cannot be resolved (Name or service" in warning
    with pytest.raises(CheckpointError, match=r"(?s)hub\.test cannot be.*tiny\.pth: the host shi\.test cannot be"):
        load(overlay=dict(url="https://shi.test/tiny.pth"))
    assert unresolved == ["hub.test", "hub.test", "shi.test"]


def test_hosts_behind_a_proxy_are_not_ours_to_resolve(unresolved, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    find_host("https://hub.test/tiny")
    monkeypatch.setenv("no_proxy", "hub.test")
    with pytest.raises(OSError, match=r"hub\.test cannot be resolved"):
        find_host("https://hub.test/tiny")
    assert unresolved == ["hub.test"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WEB_PAGE, "a web page, not a checkpoint"),
        (b"", "not a readable checkpoint, or cut short"),
        (saved({"weight": torch.zeros(1000)})[:3000], "not a readable checkpoint, or cut short"),
        (save({"weight": torch.zeros(1000)})[:3000], "not a readable checkpoint, or cut short"),
        (saved({"epoch": 3}), "holds no tensors"),
        (saved({"code": os.system}), "not a readable checkpoint.*posix.system"),
    ],
    ids=["page", "empty", "pth", "safetensors", "no_tensors", "code"],
)
def test_what_is_no_checkpoint(hub, load, caches, content, reason):
    hub.files = {FILE: content, HUB: content}
    with pytest.raises(CheckpointError, match=rf"(?s)hub shi/tiny: .*{reason}.*/tiny\.pth: .*{reason}"):
        load()
    assert not (caches["publisher"] / "tiny.pth").exists()
    assert not list(caches["publisher"].glob("*.sha256"))
    assert not list(caches["hub"].glob("*.sha256"))


def test_a_repaired_source_is_used_again(hub, load, state):
    hub.files = {HUB: WEB_PAGE}
    with pytest.raises(CheckpointError):
        load()
    hub.files = {HUB: saved(state)}
    assert same(load(), state)


def test_a_source_of_another_architecture(hub, load):
    hub.files = {FILE: saved(tiny(depths=(1, 1)).state_dict())}
    with pytest.raises(CheckpointError, match=r"tiny\.pth: the checkpoint is of another architecture than this NAT"):
        load()


@pytest.mark.parametrize("source", [HUB, FILE])
def test_pinned_hash(hub, load, state, source):
    hub.files = {HUB: saved(state), FILE: saved({"model": state})}
    cfg = PretrainedCfg(url=hub.url + FILE, hf_hub_id="shi/tiny")
    path = download(sources(cfg), sha256=sha256(hub.files[source]))
    assert path.read_bytes() == hub.files[source]
    with pytest.raises(CheckpointError, match=r"(?s)its SHA-256 is \w+, not the pinned 0000.*not the pinned 0000"):
        download(sources(cfg), sha256="0" * 64)
    assert path.read_bytes() == hub.files[source]  # a wrong pin destroys nothing


def test_hash_pinned_in_the_address(hub, load, state):
    hub.files = {FILE: saved(state)}
    right = sha256(hub.files[FILE])
    with pytest.raises(CheckpointError, match=f"its SHA-256 is {right}, not the pinned 1111"):
        load(overlay=dict(url=f"{hub.url}{FILE}#sha256={'1' * 64}"))
    assert same(load(overlay=dict(url=f"{hub.url}{FILE}#sha256={right}")), state)


def test_the_user_s_pin_wins_over_that_of_the_address(hub, state):
    hub.files = {FILE: saved(state)}
    right = sha256(hub.files[FILE])
    wrongly, rightly = (sources(PretrainedCfg(url=f"{hub.url}{FILE}#sha256={pin}")) for pin in ("1" * 64, right))
    assert download(wrongly, sha256=right.upper()).read_bytes() == hub.files[FILE]
    with pytest.raises(CheckpointError, match="not the pinned 0000"):
        download(rightly, sha256="0" * 64)


def test_a_hash_is_of_the_whole_file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3_000_000) + b"end")
    assert sha256_of(tmp_path / "file") == sha256(bytes(3_000_000) + b"end")


@pytest.mark.parametrize(("source", "place"), [(HUB, dict(hf_hub_id="shi/tiny")), (FILE, {})])
def test_a_forced_transfer(hub, state, source, place):
    hub.files = {source: saved(state)}
    places = sources(PretrainedCfg(**place or dict(url=hub.url + FILE)))
    for force, transfers in ((False, [source]), (False, []), (True, [source])):
        hub.log.clear()
        download(places, force=force)
        assert hub.bodies() == transfers


def test_a_revision_and_a_name_of_the_hub(hub, load, state):
    hub.files = {HUB: b"", "/shi/tiny/resolve/v2/mine.bin": saved(state)}
    assert same(load(overlay=dict(hf_hub_id="shi/tiny@v2", hf_hub_filename="mine.bin", url="")), state)


def test_pin_wins_over_the_record(hub, state, caches):
    hub.files = {FILE: saved(state)}
    places = sources(PretrainedCfg(url=hub.url + FILE))
    download(places)
    hub.files[FILE] = saved({"model": state})
    path = download(places, sha256=sha256(hub.files[FILE]))
    assert path.read_bytes() == hub.files[FILE]
    assert sha256(hub.files[FILE]) in (caches["publisher"] / "tiny.pth.sha256").read_text()


def test_changed_at_the_second_download(hub, load, state, caches):
    hub.files = {FILE: saved(state)}
    load()
    cached = caches["publisher"] / "tiny.pth"
    cached.unlink()
    hub.files = {FILE: saved({key: value + 1 for key, value in state.items()})}
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"the file changed: its SHA-256 is .* first download\. Delete .*tiny\.pth\.sha256"
        ):
            load()
        assert not cached.exists()
    (caches["publisher"] / "tiny.pth.sha256").unlink()
    load()


def test_changed_at_the_hub(hub, load, state, caches):
    hub.files = {HUB: saved(state)}
    load()
    for path in caches["hub"].glob("[bsr]*/*"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    hub.files = {HUB: saved({key: value + 1 for key, value in state.items()})}
    with pytest.raises(CheckpointError, match=r"hub shi/tiny: .*the file changed"):
        load()


@pytest.mark.parametrize("source", [HUB, FILE])
def test_cached_file_that_decays_is_fetched_again(hub, load, state, source, tmp_path):
    hub.files = {source: saved(state)}
    load()
    cached = next(path for path in tmp_path.rglob("*") if path.suffix in (".pth", ".bin")).resolve()
    cached.write_bytes(hub.files[source][:-500])
    assert same(load(), state)
    assert cached.read_bytes() == hub.files[source]
    cached.write_bytes(WEB_PAGE)
    hub.files = {}
    with pytest.raises(CheckpointError, match=r"(?s)web page.*404"):
        load()


def test_same_name_from_another_address(hub, load, state):
    hub.files = {FILE: saved(state), "/mine/tiny.pth": saved(state)}
    load()
    with pytest.raises(CheckpointError, match=f"came from {hub.url}{FILE}; move it, or set cache_dir"):
        load(overlay=dict(url=f"{hub.url}/mine/tiny.pth"))


def test_cache_dir(hub, load, state, tmp_path):
    hub.files = {FILE: saved(state), HUB: saved(state)}
    load(cache_dir=tmp_path / "mine")
    load(cache_dir=tmp_path / "mine", overlay=dict(hf_hub_id=None))
    assert (tmp_path / "mine" / "models--shi--tiny").is_dir()
    assert (tmp_path / "mine" / "tiny.pth").is_file()
    assert not (tmp_path / "hub").exists()
    assert not (tmp_path / "torch").exists()


@pytest.mark.parametrize("source", [HUB, FILE])
def test_connection_that_breaks(hub, load, state, source):
    """Goes on from where it broke, within the call; huggingface_hub 0.x does so in the next one."""
    hub.files = {source: saved(state)}
    hub.cut[source] = [3000, 7000]
    for _ in range(2 if huggingface_hub.__version__ < "1" else 0):
        with pytest.raises(CheckpointError, match="no source has the weights"):
            load()
    assert same(load(), state)
    asked = [span for method, path, span in hub.log if (method, path) == ("GET", source)]
    assert asked == [None, "bytes=3000-", "bytes=7000-"]


def test_connection_that_stays_broken(hub, load, state, caches):
    """The next call goes on from where this one ended."""
    hub.files = {FILE: saved(state)}
    hub.cut[FILE] = [3000] + [3000] * 9
    with pytest.raises(CheckpointError, match=r"tiny\.pth: "):
        load()
    assert not (caches["publisher"] / "tiny.pth").exists()
    hub.cut.clear()
    hub.log.clear()
    assert same(load(), state)
    assert ("GET", FILE, "bytes=3000-") in hub.log
    assert not list(caches["publisher"].glob(".*.incomplete"))


def test_remains_of_another_version_are_not_continued(hub, load, state, caches):
    hub.files = {FILE: saved({key: value + 1 for key, value in state.items()})}
    hub.cut[FILE] = [3000] * 10
    with pytest.raises(CheckpointError):
        load()
    hub.cut.clear()
    hub.log.clear()
    hub.files = {FILE: saved(state)}
    assert same(load(), state)
    assert ("GET", FILE, None) in hub.log
    assert not list(caches["publisher"].glob(".*.incomplete"))


def test_remains_of_an_unknown_version_are_not_continued(hub, load, state):
    """A server without ETag cannot tell whether its file is still the same."""
    hub.etag = False
    hub.files = {FILE: saved({key: value + 1 for key, value in state.items()})}
    hub.cut[FILE] = [3000] * 10
    with pytest.raises(CheckpointError):
        load(overlay=dict(hf_hub_id=None))
    hub.cut.clear()
    hub.files = {FILE: saved(state)}
    assert same(load(overlay=dict(hf_hub_id=None)), state)


def test_the_publisher_gets_no_hub_token(hub, load, state, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = []
    answer = hub.RequestHandlerClass.answer
    monkeypatch.setattr(
        hub.RequestHandlerClass,
        "answer",
        lambda self, body: (seen.append((self.path, self.headers.get("authorization"))), answer(self, body)),
    )
    hub.files = {FILE: saved(state)}
    load()
    assert {token for path, token in seen if path == FILE} == {None}
    assert {token for path, token in seen if path.startswith("/shi/")} == {"Bearer hf_secret"}


def test_offline_without_a_cache(hub, load, state, monkeypatch, close_session):
    hub.files = {HUB: saved(state), FILE: saved(state)}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()  # which fixes the mode
    with pytest.raises(CheckpointError, match=r"(?s)hub shi/tiny: .*offline mode.*tiny\.pth: .*offline mode"):
        load()
    assert not hub.log
    close_session()


SCRIPT = f"""
import sys, timm, torch, dinat
for source in dict(hf_hub_id="shi/tiny"), dict(url=sys.argv[1]):
    model = timm.create_model("dinat_pico", pretrained=True, pretrained_cfg_overlay=source, **{ARCHITECTURE})
    print(float(model.head.fc.weight.sum()))
"""


def test_two_processes_at_once_then_offline(server, state, tmp_path):
    """Fresh processes, configured by nothing but their environment."""
    caches = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}

    def start(**environment):
        environment = os.environ | caches | {"HF_ENDPOINT": server.url} | environment
        command = [sys.executable, "-c", SCRIPT, server.url + FILE]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    server.files = {HUB: saved(state), FILE: saved(state)}
    weights = f"{float(state['head.fc.weight'].sum())}\n"
    for process in [start() for _ in range(2)]:
        output, errors = process.communicate()
        assert output == weights * 2, errors
    assert sorted(server.bodies()) == [HUB, FILE]  # one transfer each: the other process waits for it
    server.log.clear()
    output, errors = start(HF_HUB_OFFLINE="1").communicate()
    assert output == weights * 2, errors
    assert not server.log


def test_what_timm_loads_itself_still_does(hub, state, tmp_path):
    model = tiny()
    model.load_state_dict(state)
    timm.models.save_for_hf(model, tmp_path / "mine", model_args=ARCHITECTURE)
    assert same(timm.create_model(f"local-dir:{tmp_path}/mine", pretrained=True), state)
    for path in Path(tmp_path / "mine").iterdir():
        hub.files[f"/shi/native/resolve/main/{path.name}"] = path.read_bytes()
    assert same(timm.create_model("hf-hub:shi/native", pretrained=True), state)
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["num_classes"] == 5
    overlay = dict(state_dict=state, num_classes=5)
    model = timm.create_model("dinat_pico", pretrained=True, pretrained_cfg_overlay=overlay, **ARCHITECTURE)
    assert same(model, state)

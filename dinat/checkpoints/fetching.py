"""Fetching weights: cached files first, then every source in order; hashed at first sight and verified ever after.

Transfers, offline mode, proxies and `HF_ENDPOINT` are huggingface_hub's, for the publisher's server too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlparse
from urllib.request import getproxies, proxy_bypass

import huggingface_hub.constants
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, WeakFileLock
from timm.models import PretrainedCfg
from timm.models._hub import get_cache_dir, hf_split

from dinat.checkpoints.layouts import Shape, to_native
from dinat.checkpoints.reading import read_checkpoint, refuse_web_page
from dinat.errors import CheckpointError
from dinat.files import digest_of, write_text

log = logging.getLogger("dinat")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class HubFile:
    """The weights of a Hugging Face hub repository.

    Args:
        repo: "organization/name", optionally "@revision".
        filename: None for the first of `HUB_FILES` that there is.
    """

    repo: str
    filename: str | None = None

    def __str__(self) -> str:
        return f"Hugging Face hub {self.repo}"

    @property
    def address(self) -> str:
        return hf_hub_url(hf_split(self.repo)[0], self.filename or HUB_FILES[0])

    def cached(self, cache_dir: str | Path | None, sha256: str | None) -> Path | None:
        """The verified file of the cache, None if there is none."""
        path = self._cached(cache_dir)
        return path and self._verified(path, sha256)

    def download(self, cache_dir: str | Path | None, sha256: str | None) -> Path:
        """The verified file, transferred even if there is one in the cache."""
        forced = self._cached(cache_dir) is not None
        return self._verified(self._get(cache_dir, force_download=forced), sha256)

    def _cached(self, cache_dir: str | Path | None) -> Path | None:
        try:
            return self._get(cache_dir, local_files_only=True)
        except LocalEntryNotFoundError:
            return None

    def _get(self, cache_dir: str | Path | None, local_files_only: bool = False, force_download: bool = False) -> Path:
        repo, revision = hf_split(self.repo)
        options = dict(local_files_only=local_files_only, force_download=force_download)
        get = partial(hf_hub_download, repo, revision=revision, cache_dir=cache_dir, **options)
        *others, last = (self.filename,) if self.filename else HUB_FILES
        for name in others:
            try:
                return Path(get(name))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not local_files_only:  # the hub is down
                    raise
        return Path(get(last))

    def _verified(self, path: Path, sha256: str | None) -> Path:
        # beside the snapshots, so that one of another revision is held to it too
        folder = next(parent.parent for parent in path.parents if parent.name == "snapshots")
        verify(path, folder / f"{path.name}.sha256", str(self), sha256)
        return path


@dataclass(frozen=True)
class UrlFile:
    """A file on a server, cached where torch.hub caches it. An address may end in #sha256=HEX, which pins its hash."""

    url: str
    filename: str

    def __str__(self) -> str:
        return self.address

    @property
    def address(self) -> str:
        return urldefrag(self.url).url

    def cached(self, cache_dir: str | Path | None, sha256: str | None) -> Path | None:
        """The verified file of the cache, None if there is none."""
        path = self._path(cache_dir)
        return self._verified(path, path, sha256) if path.exists() else None

    def download(self, cache_dir: str | Path | None, sha256: str | None) -> Path:
        """The verified file, transferred even if there is one in the cache; goes on where it was interrupted."""
        path = self._path(cache_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _stamp(path)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if _stamp(path) != before:  # another process has been faster
                return self._verified(path, path, sha256)
            remote = get_hf_file_metadata(str(self), token=False)  # the user's hub token is not for this server
            version = hashlib.sha256(f"{self} {remote.etag}".encode()).hexdigest()[:16]
            unfinished = path.with_name(f".{path.name}.{version}.incomplete")
            for other in path.parent.glob(f".{path.name}.*.incomplete"):
                if other != unfinished or not remote.etag:  # of another version, or of one that cannot be told apart
                    other.unlink()
            with open(unfinished, "ab") as file:
                http_get(remote.location, file, resume_size=file.tell(), expected_size=remote.size)
            try:
                self._verified(unfinished, path, sha256)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        return path

    def _path(self, cache_dir: str | Path | None) -> Path:
        return Path(cache_dir or get_cache_dir()) / self.filename

    def _verified(self, path: Path, target: Path, sha256: str | None) -> Path:
        pinned = re.search(r"#sha256=([0-9a-fA-F]{64})$", self.url)
        verify(path, target.with_name(f"{target.name}.sha256"), str(self), sha256 or (pinned and pinned[1]))
        return path


def _stamp(path: Path) -> tuple[int, int] | None:
    """Identity of a file's present content; None without a file."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def verify(path: Path, record: Path, source: str, sha256: str | None = None) -> None:
    """Checks a file against its pinned or recorded hash and that it is a checkpoint; records the hash if it is new.

    Args:
        record: in the format of sha256sum(1), with the source as a comment.
        sha256: pinned by the user, 64 hexadecimal digits; wins over the record, and replaces it.

    Raises:
        CheckpointError: another hash, a file from another source, or not a checkpoint.
    """
    refuse_web_page(path)
    recorded, origin = None, source
    if record.exists():
        comment, entry = record.read_text().splitlines()
        recorded, origin = entry.split()[0], comment.removeprefix("# ")
    if origin != source and not sha256:
        raise CheckpointError(f"{record.with_suffix('')} came from {origin}; move it, or set cache_dir.")
    digest = sha256_of(path)
    expected = (sha256 or recorded or digest).lower()
    if digest != expected and sha256:
        raise CheckpointError(f"{path}: its SHA-256 is {digest}, not the pinned {expected}.")
    if digest != expected:
        raise CheckpointError(
            f"{path}: the file changed: its SHA-256 is {digest}, not {expected} as at the first download. "
            f"Delete {record} to accept it."
        )
    read_checkpoint(path)
    if recorded != digest:
        try:
            write_text(record, f"# {source}\n{digest}  {record.stem}\n")
        except OSError as error:  # a cache that others maintain
            log.warning("%s: the hash is not recorded: %s", record, error)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    return digest_of(path, "sha256")


def sources(cfg: PretrainedCfg) -> list[HubFile | UrlFile]:
    """Where the weights of a timm pretrained_cfg are, in the order in which they are tried."""
    found: list[HubFile | UrlFile] = []
    if cfg.hf_hub_id:
        found.append(HubFile(cfg.hf_hub_id, cfg.hf_hub_filename))
    if cfg.url:
        url, name = (cfg.url, None) if isinstance(cfg.url, str) else cfg.url
        # DiNAT_s files have had two names on the publisher's server
        for address in dict.fromkeys((url, re.sub(r"/(dinat_s_\w+)_in1k_(\d+)\.pth", r"/\1_1k_\2.pth", url))):
            found.append(UrlFile(address, name or Path(urlparse(address).path).name))
    return found


def download(
    places: Sequence[HubFile | UrlFile],
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    force: bool = False,
) -> Path:
    """The first verified file of these sources: from the cache of any, without touching the network, else downloaded.

    Args:
        places: see `sources`.
        cache_dir: instead of the caches of huggingface_hub and torch.hub.
        sha256: the only hash to accept, 64 hexadecimal digits.
        force: transfer again what is cached; it must still have the recorded hash.

    Raises:
        CheckpointError: no source has a file that passes; the message names the failure of each.
    """
    failures = []
    for cached in (False,) if force else (True, False):
        for place in places:
            try:
                if not cached:
                    find_host(place.address)
                path = (place.cached if cached else place.download)(cache_dir, sha256)
            except Exception as error:  # of the network, the server, the disk or the file
                failures.append(f"{place}: {_reason(error)}")
                continue
            if path:
                for failure in failures:
                    log.warning("weights are from %s, because of %s", place, failure)
                return path
    raise CheckpointError("no source has the weights:" + "".join(f"\n  {failure}" for failure in failures))


def find_host(address: str) -> None:
    """Raises OSError where the host of an address cannot be resolved: huggingface_hub would try for half a minute.

    What goes through a proxy is the proxy's to resolve, and offline mode needs no host.
    """
    url = urlparse(address)
    proxied = {url.scheme, "all"} & getproxies().keys() and not proxy_bypass(url.netloc)
    if proxied or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        socket.getaddrinfo(url.hostname, url.port or url.scheme)
    except socket.gaierror as error:
        raise OSError(
            f"the host {url.hostname} cannot be resolved ({error.strerror}); is this machine offline?"
        ) from error


def _reason(error: Exception) -> str:
    """One line; huggingface_hub hides what happened behind general advice."""
    if isinstance(error, (LocalEntryNotFoundError, ValueError)):
        error = error.__cause__ or error
    return " ".join(str(error).split()) or type(error).__name__


def find_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """The file with the weights of a timm pretrained_cfg: its own, or a verified one of its sources."""
    return Path(cfg.file) if cfg.file else download(sources(cfg), cache_dir)


def pretrained_overlay(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What to overlay on a timm pretrained_cfg so that timm has the model load its weights from a local file.

    Downloads and verifies, and reads the number of classes and the image's channels from the file. Empty for what timm
    gets itself: a state dict, `hf-hub:` and `local-dir:` models, and no weights at all.

    Raises:
        CheckpointError: see `download` and `read_checkpoint`.
    """
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir") or not cfg.has_weights:
        return {}
    path = find_weights(cfg, cache_dir)
    shape = Shape.of(to_native(read_checkpoint(path)))
    return {
        "file": str(path),
        "custom_load": True,  # by the model's `load_pretrained`: timm itself would go by the name of the file
        "num_classes": shape.num_classes,
        "input_size": (shape.in_chans, *cfg.input_size[1:]),
    }

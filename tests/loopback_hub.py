# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""As much of the Hub, on this machine, as the real client needs to commit and to read files, large ones too."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

from huggingface_hub import constants


TOKEN = "hf_test"
COMMIT = "c0" * 20
LARGE = (".safetensors", ".onnx")
PART_BYTES = 100_000


class LoopbackHub(http.server.ThreadingHTTPServer):
    """
    One repository, `me/mine`, that whoever has `TOKEN` may write; it exists from its creation on.

    Attributes:
        files: What was committed, by path.
        objects: What was uploaded as a large file, by SHA-256; several parts where it is above PART_BYTES.
        requests: Method and path of each request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.exists = False

    def environment(self, home: str, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that takes this for the Hub."""
        variables = {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": home,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        return variables | ({"HF_TOKEN": token} if token else {})


@contextlib.contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def use_hub(hub: LoopbackHub, cache: str, monkeypatch) -> None:
    """Let the clients in this process take it for the Hub, with a token; they cache what they read in that folder."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": cache,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address that it was made with
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._read()

    def do_HEAD(self):
        self._read()

    def do_PUT(self):
        body = self._body()
        _, _, oid, number = self.path.split("/")
        self.server.parts.setdefault(oid, {})[int(number)] = body
        self._answer(200, {}, {"ETag": hashlib.md5(body).hexdigest()})

    def do_POST(self):
        body = self._body()
        hub, path = self.server, self.path
        if path.startswith("/complete/"):  # the client has sent all parts
            self._answer(200, {})
            return
        if path.startswith("/verify/"):
            said = json.loads(body)
            data = b"".join(part for _, part in sorted(hub.parts[said["oid"]].items()))
            is_whole = len(data) == said["size"] and hashlib.sha256(data).hexdigest() == said["oid"]
            if is_whole:
                hub.objects[said["oid"]] = data
            self._answer(200 if is_whole else 400, {})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path.endswith("/repos/create"):
            hub.exists = True
            self._answer(200, {"url": f"{hub.url}/me/mine", "id": "me/mine", "name": "me/mine"})
        elif "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._upload_actions(**wanted) for wanted in json.loads(body)["objects"]]
            self._answer(200, {"transfer": "multipart", "objects": objects})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.files[value["path"]]
            url = f"{hub.url}/me/mine/commit/{COMMIT}"
            self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:  # validation of the card
            self._answer(200, {"errors": [], "warnings": []})

    def _upload_actions(self, oid: str, size: int) -> dict:
        url = f"{self.server.url}/upload/{oid}"
        upload = {"href": f"{url}/1"}
        if size > PART_BYTES:
            parts = {str(i + 1): f"{url}/{i + 1}" for i in range(-(-size // PART_BYTES))}
            upload = {"href": f"{self.server.url}/complete/{oid}", "header": {"chunk_size": str(PART_BYTES)} | parts}
        actions = {"upload": upload, "verify": {"href": f"{self.server.url}/verify/{oid}"}}
        return {"oid": oid, "size": size, "authenticated": True, "actions": actions}

    def _read(self):
        hub, path = self.server, self.path.partition("?")[0]
        self.server.requests.append((self.command, self.path))
        parts = path.strip("/").split("/")
        if path.startswith("/large/"):
            self._answer(200, hub.files["/".join(parts[1:])])
        elif not hub.exists or "/".join(parts[parts[0] == "api" and 2 :][:2]) != "me/mine":
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif len(parts) > 3 and parts[2] == "resolve" or (parts[0] == "api" and len(parts) > 5):
            revision, name = (parts[3], "/".join(parts[4:])) if parts[0] != "api" else (parts[5], None)
            if revision not in ("main", COMMIT):
                self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            elif name is not None:
                self._file(name)
            elif parts[4] == "tree" and len(parts) > 6:
                self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            elif parts[4] == "tree":
                files = [{"type": "file", "path": n, "oid": "0", "size": len(d)} for n, d in hub.files.items()]
                self._answer(200, files)
            else:
                self._answer(200, self._info())
        else:
            self._answer(200, self._info())

    def _info(self) -> dict:
        siblings = [{"rfilename": name} for name in self.server.files]
        return {"id": "me/mine", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def _file(self, name: str):
        data = self.server.files.get(name)
        if data is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._answer(404, {"error": "Entry not found"}, headers)
            return
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}
        if name.endswith(LARGE):  # on another host, as the Hub does: the client stops at the redirection
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            self._answer(302, b"", headers | {"Location": f"http://localhost:{self.server.server_port}/large/{name}"})
        else:
            self._answer(200, data, headers)

    def _body(self) -> bytes:
        self.server.requests.append((self.command, self.path))
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass

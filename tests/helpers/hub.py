"""A stand-in for the Hub's HTTP interface, as far as files are sent to it and fetched from it."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hf_msif.engine import repository

SHA = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories and what was asked.

    Attributes:
        repositories: "datasets/owner/name" or "models/owner/name" → {"private": bool, "files": {name: bytes}}.
        requests: "METHOD path" of all requests.
        tokens: that were sent.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.objects, self.requests, self.tokens = {}, {}, [], set()
        self.address = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def running(patch):
    """The stand-in, which `patch` makes huggingface_hub take for the Hub."""
    from huggingface_hub import constants

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    repository.is_reachable.cache_clear()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
        repository.is_reachable.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def _answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code):
        self._answer({"error": code}, 404, {"X-Error-Code": code})

    def _received(self):
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("authorization"))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, server, path = self._received(), self.server, self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("authorization") == "Bearer hf_unknown":
            return self._answer({"error": "you may not write"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            made = f"{asked.get('type', 'model')}s/{name}"
            url = f"{server.address}/{made.removeprefix('models/')}"
            if made in server.repositories:
                return self._answer({"url": url}, 409)
            server.repositories[made] = {"private": asked.get("visibility") == "private", "files": {}}
            return self._answer({"url": url})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{server.address}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"objects": objects})
        match = re.fullmatch(r"/api/(.+/.+/.+)/(preupload|commit)/main", path)
        files = server.repositories[match[1]]["files"]
        if match[2] == "preupload":
            big = (".parquet", ".safetensors")
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(big) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = server.objects[line["value"]["oid"]]
        url = f"{server.address}/{match[1].removeprefix('models/')}/commit/{SHA}"
        return self._answer({"commitUrl": url, "commitOid": SHA, "success": True})

    def do_PUT(self):
        body, oid = self._received(), self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer({})

    def do_GET(self):
        self._received()
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)", path):
            known = self.server.repositories.get(match[1])
            if known is None:
                return self._missing("RepoNotFound")
            facts = {"id": match[1].partition("/")[2], "private": known["private"], "sha": SHA, "siblings": []}
            return self._answer({**facts, "tags": [], "downloads": 0, "likes": 0})
        match = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match is None:
            return self._missing("NotFound")
        name = match[1] if match[1].startswith("datasets/") else f"models/{match[1]}"
        known = self.server.repositories.get(name)
        if known is None:
            return self._missing("RepoNotFound")
        if match[2] not in known["files"]:
            return self._missing("EntryNotFound")
        content = known["files"][match[2]]
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET  # noqa: N815

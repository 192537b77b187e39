"""A hub on this machine: serves one directory as the data set ``owner/name`` with the hub's own addresses.

Run as ``python hub_server.py DIRECTORY COMMIT``; prints its port and serves until it is killed. The client libraries
talk to it when HF_ENDPOINT says so; nothing in them is replaced.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "owner/name"


class Hub(BaseHTTPRequestHandler):
    root: Path
    commit: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        print(self.command, self.path, file=sys.stderr, flush=True)

    def entry(self, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        path = file.relative_to(self.root).as_posix()
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.answer(b"{}", 404, X_Error_Code=code, Content_Type="application/json", X_Repo_Commit=self.commit)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": file.relative_to(self.root).as_posix()} for file in self.files()]
            self.json({"id": NAME, "sha": self.commit, "private": False, "siblings": siblings, "tags": []})
        elif path.startswith(f"{api}/tree/"):
            folder = self.root / "/".join(path.removeprefix(f"{api}/tree/").split("/")[1:])
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            found = sorted(folder.rglob("*") if deep else folder.iterdir()) if folder.is_dir() else []
            if not folder.is_dir():
                return self.missing("EntryNotFound")
            self.json(
                [
                    self.entry(item)
                    if item.is_file()
                    else {"type": "directory", "path": item.relative_to(self.root).as_posix(), "oid": "0" * 40}
                    for item in found
                ]
            )
        elif path.startswith(files):
            file = self.root / "/".join(path.removeprefix(files).split("/")[1:])
            if not file.is_file():
                return self.missing("EntryNotFound")
            data = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": self.commit}
            if (asked := self.headers.get("Range")) and self.command == "GET":
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                part = data[int(begin) : int(end) + 1 if end else None]
                whole = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(data)}"
                self.answer(part, 206, Content_Range=whole, **headers)
            else:
                self.answer(data, Accept_Ranges="bytes", **headers)
        else:
            self.missing("RepoNotFound")
        return None

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/paths-info/" not in self.path:
            return self.missing("RepoNotFound")
        if "json" in (self.headers.get("Content-Type") or ""):
            asked = json.loads(body)["paths"]
        else:
            asked = parse_qs(body.decode())["paths"]
        found = []
        for name in [asked] if isinstance(asked, str) else asked:
            path = self.root / name
            if path.is_file():
                found.append(self.entry(path))
            elif path.is_dir():
                found.append({"type": "directory", "path": name, "oid": "0" * 40})
        return self.json(found)


if __name__ == "__main__":
    Hub.root, Hub.commit = Path(sys.argv[1]), sys.argv[2]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()

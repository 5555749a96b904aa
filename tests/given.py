"""What a machine was given, judged: whoever has all of it can read nothing later, and change nothing."""

import http.client
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

TOKEN = re.compile(r"ya29\.[A-Za-z0-9_-]+")
SESSION = re.compile(r"https?://[^\s\"'\\]+upload_id=[A-Za-z0-9_-]+")


def of_processes(pids):
    """What a process list and the environments of these processes show."""
    found = []
    for pid in pids:
        for name in ("environ", "cmdline"):
            found.append(Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace"))
    return found


def of_files(*folders):
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return [path.read_bytes().decode("utf-8", "replace") for path in files]


class Judge:
    """Of the texts that a machine was given. `tokens`: all that the token server ever gave out."""

    def __init__(self, storage, tokens, texts):
        self.storage, self.tokens, whole = storage, tokens, "\0".join(texts)
        self.whole = whole
        self.given, self.sessions = set(TOKEN.findall(whole)), set(SESSION.findall(whole))

    def ask(self, method, path, body=b"", token=""):
        """The status of an answer."""
        place = urlsplit(self.storage.url)
        connection = http.client.HTTPConnection(place.netloc, timeout=10)
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
        status = connection.getresponse().status
        connection.close()
        return status

    def read(self, name, token):
        return self.ask("GET", f"/download/storage/v1/b/b/o/{quote(name, safe='')}?alt=media", token=token)

    def write(self, name, token):
        return self.ask("POST", f"/upload/storage/v1/b/b/o?uploadType=media&name={quote(name)}", b"x", token)

    def remove(self, name, token):
        return self.ask("DELETE", f"/storage/v1/b/b/o/{quote(name, safe='')}", token=token)

    def list(self, prefix, token):
        return self.ask("GET", f"/storage/v1/b/b/o?prefix={quote(prefix)}", token=token)

    def no_account(self, *secrets):
        """None of these words, and no token of a person, nor of a machine's account."""
        for secret in secrets:
            assert secret not in self.whole
        wide = [token for token, grant in self.tokens.items() if grant.rules is None]
        assert wide and not [token for token in wide if token in self.whole]
        assert self.given and self.sessions

    def narrow(self, top, project, run, attempt):
        """While the token is good: this run is read and added to; nothing else, and nothing is replaced."""
        here, blobs = f"{top}{project}/runs/{run}/", f"{top}{project}/blobs/"
        there = next(name for name in self.storage.objects("b") if name.startswith(blobs))
        for token in self.given:
            assert self.read(here + "order.json", token) == 200 and self.read(there, token) == 200
            assert self.list(here, token) == 200
            for prefix in ("", top, blobs, f"{top}{project}/runs/", f"{top}open/"):
                assert self.list(prefix, token) == 403, prefix
            strange = (f"{top}open/{run}", f"{top}{project}/runs/{run}-2/order.json", f"{blobs}x", "x")
            kept = ("order.json", "manifest.jsonl", f"attempts/{attempt}/sessions.json")
            missing = ("control.json", "client.json", "token.json", "bill.json", "env.json")
            later = [f"attempts/{attempt + 1}/claim.json", f"attempts/{attempt}0/claim.json"]
            for name in (*strange, *(here + name for name in (*kept, *missing, *later))):
                assert self.write(name, token) == 403, name
                assert self.remove(name, token) == 403, name
            assert self.read(f"{top}{project}/runs/{run}-2/order.json", token) == 403

    def nothing_later(self):
        """When all tokens have expired: no reading at all, and writing only what is not there yet."""
        names = list(self.storage.objects("b"))
        for token in (*self.given, ""):
            assert {self.read(name, token) for name in names} == {401}
            assert {self.write(name, token) for name in (*names, "new")} == {401}
            assert self.list("", token) == 401
        before = self.storage.objects("b")
        for session in self.sessions:
            place = urlsplit(session)
            self.ask("PUT", f"{place.path}?{place.query}", b"forged")
        after = self.storage.objects("b")
        assert {name: after[name].data for name in before} == {
            name: found.data for name, found in before.items()
        }
        return sorted(set(after) - set(before))

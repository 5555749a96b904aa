"""A machine that belongs to a stranger, as its agent alone, and the person's account whose bucket it uses."""

import json
import os
import sys
from contextlib import contextmanager

from cloud.clock import Clock
from cloud.server import Server
from cloud.storage import Storage
from cloud.tokens import Granted, Tokens, TokenServer
from machine import Run

from cloudrun import handover
from cloudrun.config import place
from cloudrun.formats import timestamp
from cloudrun.late import collect
from cloudrun.order import Order
from cloudrun.storage.gcs import GcsBucket

PERSON = "user@example.com"
REFRESH = "1//what-the-person-got-by-logging-in"


class Google:
    """A token server for the bucket `b` of this storage, and the files of a person who has logged in."""

    def __init__(self, folder, storage):
        self._clock = Clock()
        self.storage, self.logins = storage, TokenServer(Tokens(self._clock), {REFRESH: PERSON})
        self.tokens = self.logins.tokens
        storage.tokens = Granted(self.tokens)
        self._server = Server(self.logins.answer)
        login = folder / "application_default_credentials.json"
        known = {"type": "authorized_user", "client_id": "id", "client_secret": "secret"}
        login.write_text(json.dumps({**known, "refresh_token": REFRESH}))
        url = f"http://127.0.0.1:{self._server.port}"
        self.env = {
            "STORAGE_EMULATOR_HOST": storage.url,
            "GOOGLE_APPLICATION_CREDENTIALS": str(login),
            "CLOUDSDK_AUTH_TOKEN_HOST": f"{url}/token",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STS": f"{url}/",
        }

    def close(self):
        self._server.close()
        self._clock.close()


@contextmanager
def google_of(folder, monkeypatch):
    with Storage() as storage:
        storage.create_bucket("b")
        found = Google(folder, storage)
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found
        found.close()


class Stranger(Run):
    """A run whose bucket is in Cloud Storage. Before it starts, its client gives it what a stranger gets."""

    def __init__(self, top, google, main="", files=(), **options):
        super().__init__(top, main, files, **options)
        self.google, self.given = google, {}
        self.gs = GcsBucket("gs://b/some/dir")
        for name in self.bucket.names(""):
            self.gs.put(name, self.bucket.get(name)[0])
        fields = {"project": "p", "backend": "local", "created": timestamp(0), "price": None, "env": []}
        fields.update({"origin": ["", ""], "agent": ["", ""], "place": place("local", os.environ)})
        fields["deadline"] = timestamp(google.tokens._clock.now() + self.left)
        self.whole = Order(**{**fields, **self.order}, stranger=True)
        self.gs.create(self.whole.prefix + "/order.json", self.whole.content())

    def boot(self):
        self.order = json.loads(self.whole.content())
        self.booted = True
        found = {**super().boot(), "bucket": self.gs.url}
        self.given = handover.give(self.gs, self.whole, self.attempt)
        return {**found, **self.given}

    def start(self, python=sys.executable, **environ):
        host = {"STORAGE_EMULATOR_HOST": self.google.storage.url}
        return super().start(python, **{**host, **environ})

    def collect(self):
        """What a client does that comes later. Returns what it is told."""
        told = []
        collect(self.gs, self.whole, told.append)
        for name in self.gs.names(self.whole.prefix + "/"):  # for who looks into the folder
            self.bucket.put(name, self.gs.get(name)[0])
        return told

    def late(self):
        """Names of what it stored through sessions, and nobody collected so far."""
        top = f"{self.whole.prefix}/attempts/{self.attempt}/late/"
        return [name[len(top) :] for name in self.gs.names(top)]

    def phase_there(self):
        return self.state().get("phase")

    def state(self):
        for path, found in self.google.storage.objects("b").items():
            if path.endswith(f"attempts/{self.attempt}/state.json"):
                return json.loads(found.data)
        return {}

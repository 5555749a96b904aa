"""docs/chaos.md: what a campaign has shown."""


def write(path, results, seed):
    path.parent.mkdir(exist_ok=True)
    path.write_text("")

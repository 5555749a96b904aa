"""Fast tests first: what starts whole runs comes last."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "e2e" in item.path.parts)

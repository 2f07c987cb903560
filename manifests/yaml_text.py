"""YAML text to plain values, strictly: no key twice, no dates, and every value's line kept for messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from llmserve.manifests.errors import FieldPath, ManifestError, shown


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML document."""

    value: object
    _root: yaml.Node | None

    def line(self, path: FieldPath) -> int:
        """Line, from 1, of the value at ``path``, or of the nearest one around it."""
        node, line = self._root, 1
        for part in path:
            found = _child(node, part)
            if found is None:
                break
            mark, node = found
            line = mark.line + 1
        return line


class _Loader(yaml.SafeLoader):
    """YAML 1.1's safe part without dates: nothing in a manifest is one, and broken ones raise."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, source: str) -> Document:
    """The one document in ``text``. Raises ``ManifestError`` with ``source``, line and column."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        duplicates = [
            f"{source}:{line}: key {shown(key)} stands here a second time" for line, key in _duplicates(root)
        ]
        if duplicates:
            raise ManifestError(duplicates)
        return Document(loader.construct_document(root) if root is not None else None, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        what = " ".join(filter(None, (error.context, error.problem)))
        raise ManifestError([f"{place}: not YAML: {_one_line(what)}"]) from error
    except yaml.YAMLError as error:
        raise ManifestError([f"{source}: not YAML: {_one_line(str(error))}"]) from error
    except RecursionError as error:
        raise ManifestError([f"{source}: nested too deeply"]) from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError([f"{source}: a number that cannot be read: {_one_line(str(error))}"]) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _duplicates(root: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """(line, key) of each key that its mapping has already; PyYAML would let the last one win."""
    pending: list[yaml.Node] = [root] if root is not None else []
    visited: set[int] = set()
    while pending:
        node = pending.pop()
        # Aliases are the same node again, and may even contain themselves.
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                pending.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        yield key.start_mark.line + 1, key.value
                    keys.add((key.tag, key.value))


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Mark, yaml.Node] | None:
    """Where the child begins (at its key, if it has one), and the child."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == part:
                return key.start_mark, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child: yaml.Node = node.value[part]
        return child.start_mark, child
    return None

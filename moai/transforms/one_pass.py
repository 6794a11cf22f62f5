"""Where each message ends in a filled-in chat template, from filling it in once.

    template = with_borders(environment, source)      # None where that cannot be shown
    template.generate(messages=..., border=mark, ...)  # gives `mark`, the same object, wherever a message ends

A template that does not mark answers is filled in with every beginning of a conversation, to see what each message
adds: quadratic in the messages. Where what it writes of a message depends on that and the messages before it alone, the
whole text begins with the text of every beginning, and one pass shows all borders. That is read from the template's
syntax tree, and refused wherever something else stands than this:

    any text and settings that read of the messages only the first
    {% for message in messages %}        no filter, no else, no recursion, no loop within; of `loop` only what is
        ...                              known at that message: first, index, index0, previtem
    {% endfor %}
    {% if add_generation_prompt %} text {% endif %}
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import nodes

_LOOP = {"first", "index", "index0", "previtem"}
_NOT_INSIDE = {
    "add_generation_prompt", "caller", "kwargs", "raise_exception", "self", "strftime_now", "varargs",
}  # fmt: skip
_NOT_ANYWHERE = (
    nodes.Macro, nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends, nodes.Block, nodes.CallBlock,
)  # fmt: skip
_TOKENS = {"bos_token", "eos_token"}


def with_borders(environment: Any, source: str) -> Any | None:
    """A compiled template that writes `border` behind each message, or None where one pass shows nothing."""
    tree = environment.parse(source)
    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if len(loops) != 1 or any(tree.find_all(_NOT_ANYWHERE)):
        return None
    before, loop, behind = tree.body[: loops[0]], tree.body[loops[0]], tree.body[loops[0] + 1 :]
    lists = _names_of_the_list(before)
    if lists is None or not _is_plain(loop, lists) or not _only_prompts(behind):
        return None
    if not all(_depends_on_the_past(node, lists) for node in loop.body):
        return None
    note = nodes.Output([nodes.Name("border", "load")])
    loop.body.append(note.set_lineno(loop.lineno))
    tree.set_environment(environment)
    made = type(environment.from_string(""))
    return made.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _names_of_the_list(before: Iterable[nodes.Node]) -> set[str] | None:
    """`messages`, and what is set to it; None where something before the loop reads more of it than the first."""
    lists = {"messages"}
    for node in before:
        match node:
            case nodes.Assign(target=nodes.Name(name=name), node=nodes.Name(name=of)) if of in lists:
                lists.add(name)
            case _ if not _reads_only_the_first(node, lists) or "add_generation_prompt" in _names(node):
                return None
    return lists


def _is_plain(loop: nodes.For, lists: set[str]) -> bool:
    is_over_all = isinstance(loop.iter, nodes.Name) and loop.iter.name in lists
    is_named = isinstance(loop.target, nodes.Name)
    return is_over_all and is_named and not (loop.test or loop.else_ or loop.recursive)


def _depends_on_the_past(node: nodes.Node, lists: set[str]) -> bool:
    if not _reads_only_the_first(node, lists) or _found(node, nodes.For) or _names(node) & _NOT_INSIDE:
        return False
    known = {
        id(read.node)
        for read in _found(node, (nodes.Getattr, nodes.Getitem))
        if isinstance(read.node, nodes.Name) and read.node.name == "loop" and _key(read) in _LOOP
    }
    return all(id(name) in known for name in _found(node, nodes.Name) if name.name == "loop")


def _only_prompts(behind: list[nodes.Node]) -> bool:
    """Once `if add_generation_prompt`, with constant text."""
    prompts = [node for node in behind if isinstance(node, nodes.If)]
    if len(prompts) != 1 or any(not isinstance(node, nodes.If) and not _is_empty(node) for node in behind):
        return False
    [prompt] = prompts
    asks = isinstance(prompt.test, nodes.Name) and prompt.test.name == "add_generation_prompt"
    constant = all(isinstance(node, nodes.Output) and _names(node) <= _TOKENS for node in prompt.body)
    return asks and constant and not (prompt.elif_ or prompt.else_)


def _is_empty(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Output) and all(
        isinstance(part, nodes.TemplateData) and not part.data for part in node.nodes
    )


def _reads_only_the_first(node: nodes.Node, lists: set[str]) -> bool:
    """`messages[0]` is there in every beginning but the empty one, of which no text is asked."""
    firsts = {
        id(read.node)
        for read in _found(node, nodes.Getitem)
        if isinstance(read.node, nodes.Name) and isinstance(read.arg, nodes.Const) and read.arg.value == 0
    }
    return all(id(name) in firsts for name in _found(node, nodes.Name) if name.name in lists)


def _found(node: nodes.Node, kind: Any) -> list[Any]:
    """`find_all` leaves out the node itself."""
    return [*([node] if isinstance(node, kind) else []), *node.find_all(kind)]


def _names(node: nodes.Node) -> set[str]:
    return {name.name for name in _found(node, nodes.Name)}


def _key(read: Any) -> Any:
    return read.attr if isinstance(read, nodes.Getattr) else getattr(read.arg, "value", None)

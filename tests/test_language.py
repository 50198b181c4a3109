"""The words and the shape of the code.

Docstrings that are sentences, the field's names, lines and files of a readable size.
"""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = sorted([*(ROOT / "dlm_ray").rglob("*.py"), *(ROOT / "evaluation").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FILES = sorted([*PACKAGE, *(ROOT / "cluster").rglob("*.py"), *TESTS])

MAX_COLUMNS = 120
MAX_LINES = 375
"""The goal is 350; a file that passes it a little is not split for that."""
MAX_LINES_OF_TESTS = 400
MAX_LINES_OF_EXCEPTIONS = 700
# One subject whose tests need the same fixtures.
EXCEPTIONS = {
    "tests/serving/http/test_api.py",
    "tests/checkpoint/test_commit.py",
    "tests/diffusion/objectives/test_block.py",
    "tests/evaluation/studies/test_studies.py",
}

# Words that were replaced by the field's; whole identifiers.
RETIRED = {
    # Classes.
    "Way", "Chosen", "Sampled", "Asked", "Written", "WrittenBlocks", "Choosing", "Residents", "Gate",
    "Counts", "Terms", "Trainee", "Seal", "Recording", "PackedRow", "RowReference", "RowLayout",
    # Functions and attributes.
    "never_drawn", "num_found_tokens", "is_shown", "fill_from", "anchored", "_conclude", "gather_again", "under_way",
    "by_way", "seal", "told", "_told",
    # Keys of recipes and sweeps, options and metrics.
    "final_ratio", "max_gradient_norm", "look_every_seconds", "global_batch_rows", "micro_batch_rows", "row_tokens",
    "draws_per_row", "variance_rows", "gradient_rows", "visible_future", "LOOKING", "ASKING",
}  # fmt: skip

WITH_UNDERSCORE = re.compile(
    rf"(?:(?<!\w)|(?<=__))(?:{'|'.join(sorted(word for word in RETIRED if '_' in word.strip('_')))})(?!\w)"
)


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def documented(path):
    """Return the functions, methods and classes of a file that have a docstring, with it."""
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = ((node, ast.get_docstring(node)) for node in ast.walk(tree_of(path)) if isinstance(node, nodes))
    return [(node, docstring) for node, docstring in found if docstring]


def assert_none(violations):
    """Fail with one line a violation."""
    violations = list(violations)
    assert not violations, f"{len(violations)}:\n" + "\n".join(violations)


def test_a_docstring_is_a_sentence_of_four_words_or_more():
    assert_none(
        f"{name_of(path)}:{node.lineno} {node.name}: {docstring.splitlines()[0]}"
        for path in PACKAGE
        for node, docstring in documented(path)
        if len(docstring.split()) < 4 or docstring.startswith("Of ")
    )


def test_no_line_is_longer_than_120_columns():
    assert_none(
        f"{name_of(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MAX_COLUMNS
    )


def test_a_file_stays_short_enough_to_read():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    limits = {name: MAX_LINES_OF_TESTS if name.startswith("tests/") else MAX_LINES for name in lengths}
    limits |= dict.fromkeys(EXCEPTIONS, MAX_LINES_OF_EXCEPTIONS)
    assert_none(f"{name}: {length} lines" for name, length in lengths.items() if length > limits[name])
    assert_none(
        f"{name} is short enough: it is no exception" for name in EXCEPTIONS if lengths[name] <= MAX_LINES_OF_TESTS
    )


def test_no_retired_word_is_an_identifier():
    """A name with an underscore does not stand in strings either: `optimizer.final_ratio`, `training__row_tokens`."""

    def words(path):
        text = path.read_text()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from ((token.start[0], token.string) for token in tokens if token.type == tokenize.NAME)
        yield from ((text.count("\n", 0, match.start()) + 1, match[0]) for match in WITH_UNDERSCORE.finditer(text))

    others = [path for path in FILES if path != Path(__file__)]
    assert_none(
        f"{name_of(path)}:{line} {word}"
        for path in others
        for line, word in sorted(set(words(path)))
        if word in RETIRED
    )


def test_a_test_says_in_its_name_what_is_so():
    """Three words or more behind `test_`."""
    nodes = [(path, node) for path in TESTS for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    tests = [(path, node) for path, node in nodes if node.name.startswith("test_")]
    assert_none(f"{name_of(path)}: {node.name}" for path, node in tests if len(node.name.split("_")) < 4)


def test_no_test_imports_another_test():
    """What tests share is in tests/helpers."""

    def modules(path):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom):
                yield node.module or ""
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    assert_none(
        f"{name_of(path)} imports {module}"
        for path in TESTS
        for module in modules(path)
        if module.split(".")[0].startswith(("test_", "conftest"))
    )

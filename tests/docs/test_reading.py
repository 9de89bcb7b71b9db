"""What counts as a step of a guide, how it is made small, and what a guide is told that nobody can follow."""

import pytest

from tests.chain.hub_server import Hub
from tests.docs.programs import Reader
from tests.docs.reading import Step, read_steps
from tests.docs.world import World, miniature

GUIDE = """\
Inline: `cbd-trl demo` and `num_layers`, no command; `make test`.

    cbd-trl init my-chain \\
        --output a   # the small one
    prose that is indented

```bash
$ A=1 accelerate launch -m cbd_trl.cli build c.yaml
# a comment
cbd-trl push a \\
  --to "b # c"
```

```python
x = 1
```

```yaml
# folder/c.yaml
source: x
```

```yaml
not: a file
```
"""


def test_commands_blocks_and_files_are_steps():
    assert read_steps(GUIDE) == [
        Step("command", "cbd-trl demo", 1),
        Step("command", "make test", 1),
        Step("command", "cbd-trl init my-chain --output a   # the small one", 3),
        Step("command", "A=1 accelerate launch -m cbd_trl.cli build c.yaml", 8),
        Step("command", 'cbd-trl push a --to "b # c"', 10),
        Step("python", "x = 1\n", 15),
        Step("file", "# folder/c.yaml\nsource: x\n", 19, "folder/c.yaml"),
    ]


@pytest.mark.parametrize(
    ("text", "small"),
    [
        ("init my-60M --sizes 50M,1.5M --output my-60M", "init my-60M --sizes 50K,1.5K --output my-60M"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("from_chain(x, 60e6, learning_rate=4e-4)", "from_chain(x, 60e3, learning_rate=4e-4)"),
        ('{"num_hidden_layers": 20}', '{"num_hidden_layers": 7}'),
        ("num_hidden_layers: 16\nnum_attention_heads: 6", "num_hidden_layers: 6\nnum_attention_heads: 3"),
        ('{"num_hidden_layers": 3}', '{"num_hidden_layers": 3}'),
    ],
)
def test_steps_are_made_small(text, small):
    assert miniature(text) == small


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Reader(tmp_path, World(tmp_path / "world", Hub()))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("frobnicate --all", "nothing is known of the program 'frobnicate': add how it is run .* to PROGRAMS"),
        ("cbd-trl frobnicate ...", "there is no command 'frobnicate'"),
        ("cbd-trl init my-chian --output x --num-parameters 1M", "exit code 1: .*my-chian"),
        ("cbd-trl demo --stpes 3", r"exit code 2: .*no flag '--stpes'"),
        ("python -m benchmarks.merit --stpes 3", r"benchmarks.merit has no flags \['--stpes', '3'\]"),
        ("python -m benchmarks.merit --skip-blocks many", "argument --skip-blocks: invalid int value"),
        ("python -m frobnicate", "nothing is known of python frobnicate"),
        ("python examples/frobnicate.py", "there is no examples.frobnicate"),
        ("accelerate launch --config_file no.yaml -m cbd_trl.cli build ...", "no.yaml is shown by no block"),
        ("accelerate frobnicate", "nothing is known of accelerate frobnicate"),
        ("make frobnicate", r"no target \['frobnicate'\]"),
        ('pip install "cbd-trl[frobnicate]"', "the extras are"),
    ],
)
def test_a_command_that_nobody_can_follow_is_found_out(reader, command, message):
    with pytest.raises(AssertionError, match=message):
        reader.follow(Step("command", command, 1))


def test_python_sees_what_came_before_and_what_the_tests_have(reader):
    reader.follow(Step("python", "rows = len(dataset)", 1))
    reader.follow(Step("python", "assert rows == 24 and from_chain is not None", 2))
    with pytest.raises(NameError, match="frobnicate"):
        reader.follow(Step("python", "frobnicate()", 3))


def test_files_are_written_small_and_inputs_are_copies(reader, tmp_path):
    reader.follow(Step("file", "# a/b.yaml\nsize: 60e6\n", 1, "a/b.yaml"))
    assert (tmp_path / "a" / "b.yaml").read_text().endswith("size: 60e3\n")
    reader.follow(Step("python", 'file = open("rows.jsonl", "a")\nfile.write("x")\nfile.close()', 2))
    kept = tmp_path / "world" / "rows-jsonl" / "it"
    assert (tmp_path / "rows.jsonl").read_text() == kept.read_text() + "x"


def test_what_a_step_makes_is_not_put_there_before(reader, tmp_path):
    reader.follow(Step("python", 'def make(output_dir): return output_dir\nmake(output_dir="my-chain")', 1))
    assert not (tmp_path / "my-chain").exists()

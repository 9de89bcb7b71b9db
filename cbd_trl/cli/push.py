"""`cbd-trl push`."""

from dataclasses import dataclass, field

from cbd_trl.cli.parsing import Command, UsageError


@dataclass
class PushArguments:
    """Arguments of `cbd-trl push`. The token is that of `hf auth login` or `HF_TOKEN`: a flag would stay in the
    shell's history.

    Args:
        private: whether a repository that is made is private.
        revision: branch to push to.
        message: of the commit.
        own_repos: a repository for each anchor.
    """

    private: bool = field(
        default=False,
        metadata={
            "help": "A repository that is made is private, and a public one is refused. Not set: the owner's default."
        },
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, made if there is none. Not set: the main one."}
    )
    message: str = field(default="Upload chain", metadata={"help": "Message of the commit."})
    own_repos: bool = field(
        default=False,
        metadata={
            "help": "Put each anchor in a repository of its own, REPO-ANCHOR, where it is a model like any other; the "
            "chain's repository pins their commits."
        },
    )


COMMAND = Command(
    "push",
    "CHAIN REPO [options]",
    "Upload a chain to the Hub. Run again after an interruption, files that arrived are not sent again.",
    own=(PushArguments,),
    hyphens=True,
    positional={
        "chain": "The chain: a folder that build wrote, or a Hub id. Required.",
        "repo": "The repository, 'me/my-chain', made if there is none. Required.",
    },
)


def push(flags: list[str]) -> None:
    """Run `cbd-trl push`.

    Args:
        flags: as typed.
    """
    arguments, places = COMMAND.parse(flags)
    if places.chain is None or places.repo is None:
        raise UsageError("The chain or the repository is missing: cbd-trl push CHAIN REPO.")
    from cbd_trl.chain.chain import Chain

    commit = Chain.from_pretrained(places.chain).push_to_hub(
        places.repo,
        private=arguments.private or None,
        revision=arguments.revision,
        commit_message=arguments.message,
        own_repos=arguments.own_repos,
    )
    print(f"Pushed: {commit}")
    print(f'from_chain("{commit.repo_url.repo_id}", num_parameters=..., revision="{commit.oid}") makes a model of it.')

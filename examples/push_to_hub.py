"""Make a model of any size from a chain and share it, as any other model is shared.

python examples/push_to_hub.py --chain my-chain --num_parameters 60e6 --repo_id me/my-60M
"""

import argparse

from transformers import AutoTokenizer

from cbd_trl import from_chain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", required=True, help="folder or Hub id of a chain")
    parser.add_argument("--num_parameters", required=True, type=float, help="size of the model")
    parser.add_argument("--repo_id", required=True, help="where it goes; made if it is not there")
    parser.add_argument("--public", action="store_true", help="for everybody to see")
    arguments = parser.parse_args()

    model = from_chain(arguments.chain, arguments.num_parameters)
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    for part in (model, tokenizer):
        part.push_to_hub(arguments.repo_id, private=not arguments.public)

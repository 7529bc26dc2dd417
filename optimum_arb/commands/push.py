"""Upload a saved binarized model to the Hub, with its card, as one commit."""

from __future__ import annotations

import argparse

from .printing import json_text

EXAMPLES = """\
  %(prog)s smollm2-arb me/smollm2-135m-arb --private
  %(prog)s smollm2-arb me/smollm2-135m-arb --revision two-planes --message "Two planes" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIRECTORY", help="directory of a binarized model; all of it is uploaded")
    parser.add_argument("repo", metavar="REPO", help="the model on the Hub, e.g. me/model; made if there is none")
    parser.add_argument("--private", action="store_true", help="make it a private one, if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to upload to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..hub import push_directory
    from .loading import check_model

    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"There is no model directory {args.model}.")
    check_model(args.model)
    info = push_directory(
        args.model,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    url = info.pr_url or info.commit_url
    if args.json:
        print(json_text({"model": args.model, "repo": args.repo, "commit": info.oid, "url": url}))
    else:
        print(f"uploaded {args.model}: {url}")

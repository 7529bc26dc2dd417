"""`optimum-cli arb ...`, the same commands as `python -m optimum_arb ...`.

`optimum-cli` imports this file at every start, whatever the user asked for. It therefore imports nothing of
optimum_arb, which needs torch and transformers, and hands the arguments on unparsed.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class ARBCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="arb", help="Binarize language models to about one bit a weight, and measure them.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER)

        def format_help() -> str:
            from optimum_arb.commands.main import build_parser

            return build_parser("optimum-cli arb").format_help()

        parser.format_help = format_help  # type: ignore[method-assign]

    def run(self) -> None:
        from optimum_arb_cli import main

        raise SystemExit(main(self.args.arguments, prog="optimum-cli arb"))


REGISTER_COMMANDS = [ARBCommand]

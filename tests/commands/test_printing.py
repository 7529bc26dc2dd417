"""What every command prints with `--json`."""

import json
import math

from optimum_arb.commands.printing import json_text


def test_json_text_is_json():
    """JSON has no infinity and no NaN, which a float perplexity may be; what is there stays what it is."""
    content = {
        "perplexity": math.inf,
        "rows": [{"error": math.nan, "count": 3}, (-math.inf, 0.25, "Infinity", None, True)],
    }

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(json_text(content), parse_constant=refuse)
    assert found == {"perplexity": None, "rows": [{"error": None, "count": 3}, [None, 0.25, "Infinity", None, True]]}

"""What an engine is told survives the way through JSON, and what it would not understand is refused."""

import json
import math
from dataclasses import replace

import pytest

from trl_blend import LogitMixing, ProbabilityMixing, SpeculativeKD, TrustRegion
from trl_blend.errors import ConfigError
from trl_blend.generation.rules import ChernoffBlend, ContrastiveDecoding, LogitArithmetic
from trl_blend.ops.vocab import EosMap
from trl_blend.serving.blend import Blend


@pytest.mark.parametrize(
    "rule",
    [
        None,
        LogitMixing(0.3),
        LogitMixing((0.1, 0.2)),
        ProbabilityMixing((0.4,)),
        TrustRegion(0.01),
        TrustRegion(math.inf, rtol=1e-4),
        SpeculativeKD(15, 0.2),
        ChernoffBlend(0.5),
        ContrastiveDecoding(0.2, 0.4),
        LogitArithmetic(1.0, (1.0, -1.0)),
    ],
)
def test_a_blend_survives_json(rule):
    blend = Blend(rule, temperature=0.7, eos=EosMap(1, (2, 3)), vocab_size=9, stop_token_ids=(1, 2), records=True)
    blend = replace(blend, draft_tokens=0)
    assert Blend.from_dict(json.loads(json.dumps(blend.to_dict()))) == blend
    assert Blend.from_dict(json.loads(json.dumps(Blend(rule).to_dict()))) == Blend(rule)


class OtherRule(LogitMixing):
    """One that an engine has no name for."""


def test_refusals():
    with pytest.raises(ConfigError, match="`rule` is .*OtherRule.*Use one of LogitMixing, "):
        Blend(OtherRule(0.3))
    with pytest.raises(ConfigError, match="`temperature=0.0` must be positive. For greedy requests"):
        Blend(LogitMixing(0.3), temperature=0.0)
    with pytest.raises(ConfigError, match="`rule` is 'Unknown'"):
        Blend.from_dict(Blend().to_dict() | {"rule": {"name": "Unknown"}})
    with pytest.raises(ConfigError, match="`kl_budget` is -1"):
        Blend.from_dict(Blend().to_dict() | {"rule": {"name": "TrustRegion", "kl_budget": -1}})

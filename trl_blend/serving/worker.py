"""The calls that reach an engine between two generations: in this process, or a server through `/collective_rpc`."""

from typing import Any

from trl_blend.errors import ConfigError
from trl_blend.serving.blend import Blend


EXTENSION = "trl_blend.serving.worker.BlendWorkerExtension"
"""Value of vLLM's `worker_extension_cls`."""


class BlendWorkerExtension:
    """
    What vLLM adds to the worker of each device (`worker_extension_cls`). Arguments and results fit into JSON, which is
    how they travel to a server.
    """

    def set_blend(self, blend: dict[str, Any]) -> None:
        """Draw from another [`~trl_blend.serving.blend.Blend`] from here on, given as [`Blend.to_dict`] gives it."""
        self._blend_model().set_blend(Blend.from_dict(blend))

    def describe_blend(self) -> dict[str, Any]:
        """What the engine holds: the names of its partners, and the blend that it draws from."""
        model = self._blend_model()
        return {"partners": [partner.model for partner in model.partners], "blend": model.blend.to_dict()}

    def take_blend_statistics(self) -> dict[str, list[float]]:
        """Total, count and largest value of each statistic since the last call or the last [`set_blend`]."""
        return {name: list(sums) for name, sums in self._blend_model().sums.pop().items()}

    def _blend_model(self) -> Any:
        model = self.get_model()  # type: ignore[attr-defined]
        if not hasattr(model, "set_blend"):
            raise ConfigError(
                f"The engine serves a {type(model).__name__}, which blends nothing. Start it with the settings that "
                "`trl_blend.serving.arguments.engine_arguments` gives."
            )
        return model

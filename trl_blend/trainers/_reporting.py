"""What shows a run while it goes on, and when it is over: the method's quantity in the progress bar, and a picture."""

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import ProgressCallback, TrainerCallback
from trl import RichProgressCallback

from trl_blend.reports.curves import CURVES_FILE, draw_curves, progress_text


logger = get_logger(__name__)


def add_callbacks(trainer: Any) -> None:
    """Give a trainer the callbacks that every trainer of this package has."""
    trainer.add_callback(MethodProgressCallback(trainer))
    trainer.add_callback(CurvesCallback(trainer))


def write_curves(trainer: Any) -> Path | None:
    """
    Draw what was logged so far into `output_dir/training_curves.png`. A failure is reported and loses nothing.

    Args:
        trainer ([`~transformers.Trainer`]):
            A trainer with `_panels`. The main process draws, whatever `report_to` says.

    Returns:
        `pathlib.Path` or `None`: The file; `None` on the other processes, where nothing was logged yet, and after a
        failure.
    """
    if not trainer.is_world_process_zero():
        return None
    path = Path(trainer.args.output_dir) / CURVES_FILE
    try:
        drawn = draw_curves(trainer.state.log_history, trainer._panels, path, title=f"{trainer._name}: training")
    except Exception as error:  # whatever it is, the trained model is worth more than its picture
        logger.warning(
            f"The training curves could not be drawn into '{path}' ({type(error).__name__}: {error}). The run is not "
            "affected. When the cause is mended, draw them from `trainer.state.log_history`, or from the "
            "`log_history` in a checkpoint's `trainer_state.json`, with `trl_blend.reports.curves.draw_curves("
            "log_history, trainer._panels, path)`."
        )
        return None
    return path if drawn else None


class CurvesCallback(TrainerCallback):
    """Calls [`write_curves`] when training ends, early or not."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        write_curves(self.trainer)


class MethodProgressCallback(TrainerCallback):
    """Shows the method's quantity, as last logged, on the training bar that another callback draws."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        text = progress_text(logs or {}, self.trainer._panels)
        if not (text and state.is_world_process_zero):
            return
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)  # there while training only
            if bar is None:
                continue
            if isinstance(callback, ProgressCallback):
                bar.set_postfix_str(text)
            elif isinstance(callback, RichProgressCallback):
                bar.update(callback.training_task, description=f"[blue]Training[/] {text}")

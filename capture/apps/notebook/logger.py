"""BHRoutingLogger: the run of a notebook experiment, with its JSON summaries and figures."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from bhlog.analysis.run import Run, open_log
from bhlog.capture.apps.notebook.loose import LooseRows
from bhlog.capture.apps.notebook.told import json_decisions, summary_of
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.manifest import MANIFEST_NAME, Manifest, ModelInfo, Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.observe import new_writer
from bhlog.capture.recorder import Recorder
from bhlog.capture.routers.routing import Choice
from bhlog.capture.writing.writer import RunWriter, WriterOptions, remove_run

# what earlier notebooks drew
FIGURES = (
    "p_values",
    "step_up",
    "expert_heatmap",
    "experts_histogram",
    "logits_p_values",
    "passing_rate",
)


class BHRoutingLogger:
    """Keeps what a patched model, or benjamini_hochberg_routing, decided; one of them at a time.

    Files: `OUTPUT_DIR/logs/NAME/` is the run as Parquet, complete at `save_logs()` and at
    `unpatch()`; `save_logs()` adds `NAME_bh_log.json` and `NAME_summary.json` beside it, and
    `generate_plots()` six figures in `OUTPUT_DIR/plots/NAME/`. An experiment of the same name that
    a logger wrote earlier is replaced when the logger is first used.

    Args:
        output_dir: where everything goes.
        experiment_name: names the files.
        log_every_n: log the tokens at every n-th position, at every layer. With empirical p-values,
            which depend on the whole batch, the run keeps every token and only the JSON log
            samples.
    """

    def __init__(
        self, output_dir: str | Path, experiment_name: str = "experiment", log_every_n: int = 1
    ) -> None:
        if log_every_n < 1:
            raise InvalidOption(f"log_every_n must be at least 1, got {log_every_n}")
        if not experiment_name or Path(experiment_name).name != experiment_name:
            raise InvalidOption(f"experiment_name must be a plain name, got {experiment_name!r}")
        self.output_dir = Path(output_dir)
        self.experiment_name = experiment_name
        self.log_every_n = log_every_n
        self._writer: RunWriter | None = None
        self._setting: tuple[ModelInfo, Routing, KdeModel | None] | None = None
        self._recorder: Recorder | None = None
        self._loose = LooseRows()

    @property
    def run_dir(self) -> Path:
        """The run's folder, which every analysis command opens."""
        return self.output_dir / "logs" / self.experiment_name

    @property
    def plots_dir(self) -> Path:
        """Where the figures go."""
        return self.output_dir / "plots" / self.experiment_name

    def open(self, info: ModelInfo, routing: Routing, kde: KdeModel | None) -> RunWriter:
        """Start the run afresh; what an earlier logger of this name wrote is removed.

        Raises:
            RunExists: the folder holds something else.
            InvalidOption: the logger holds decisions of benjamini_hochberg_routing.
        """
        if self._loose.rows:
            raise InvalidOption(
                f"{self.run_dir}: this logger holds decisions of benjamini_hochberg_routing, which "
                "a patched model would replace; clear() it, or give the model a logger of its own"
            )
        return self._begin(info, routing, kde)

    def _begin(self, info: ModelInfo, routing: Routing, kde: KdeModel | None) -> RunWriter:
        if self._writer is not None:
            self._writer.close()
        _remove_experiment(self.run_dir)
        empirical = routing.options is not None and routing.options.p_values == "empirical"
        self._setting = (info, routing, kde)
        self._writer = new_writer(
            self.run_dir,
            info,
            routing,
            kde=kde,
            options=WriterOptions(sample_every=1 if empirical else self.log_every_n),
            extra={"experiment_name": self.experiment_name},
        )
        return self._writer

    def follow(self, recorder: Recorder) -> None:
        """Name the recorder that still holds rows on the device."""
        self._recorder = recorder

    def log_decisions(
        self,
        logits: Tensor,
        choice: Choice,
        *,
        routing: Routing,
        kde: KdeModel | None,
        layer: int,
        sequence: int,
        position: int,
        every: int,
    ) -> None:
        """Keep what benjamini_hochberg_routing decided for T tokens of a sequence.

        Args:
            logits: (T, E); choice: of the same rows.
            sequence: sample_idx; position: token_idx of the first row.
            every: keep the positions that are a multiple of it.

        Raises:
            InvalidOption: the logger holds the run of a patched model.
        """
        if self._writer is not None and not self._loose.rows:
            raise InvalidOption(
                f"{self.run_dir}: this logger holds the run of a patched model, which decisions of "
                "benjamini_hochberg_routing would replace; unpatch() the model and clear() the "
                "logger, or give the function a logger of its own"
            )
        self._loose.add(logits, choice, layer, sequence, position, every)
        self._loose.setting = (routing, kde)

    def save_logs(self) -> Path:
        """Seal the run so far and write both JSON files; return the path of the log file.

        Raises:
            RouterLogError: nothing was logged.
        """
        log = self._sealed()
        folder = self.run_dir.parent
        manifest = log.manifest
        path = folder / f"{self.experiment_name}_bh_log.json"
        config = {
            "experiment_name": self.experiment_name,
            "log_every_n": self.log_every_n,
            "model": vars(manifest.model),
            "routing": manifest.routing.kind,
            **(manifest.routing.options.to_json() if manifest.routing.options else {}),
        }
        _write_json(
            path,
            {
                "config": config,
                "run": str(self.run_dir),
                "total_decisions": manifest.totals.rows,
                "decisions": json_decisions(log, self.log_every_n),
            },
        )
        _write_json(folder / f"{self.experiment_name}_summary.json", self.get_summary())
        return path

    def generate_plots(self) -> list[Path]:
        """Draw the six figures of the run into `plots_dir`; return their paths."""
        return self._sealed().plot(FIGURES, self.plots_dir)

    def get_summary(self) -> dict[str, Any]:
        """Counts over everything logged so far.

        Returns:
            total_decisions (rows); mean, std, min and max of experts_selected; the share of
            decisions at max_k (ceiling_hit_rate) and at min_k (floor_hit_rate); p_values: mean,
            std, min, max and the shares below 0.01, 0.05 and 0.1.
        """
        if self._writer is None and not self._loose.rows:
            return {"total_decisions": 0}
        log = self._sealed()
        return summary_of(log)

    def clear(self) -> None:
        """Forget everything logged so far; logging goes on."""
        self._loose = LooseRows()
        if self._recorder is not None and self._setting is not None:
            self._recorder.flush()
            self._recorder.writer = self._begin(*self._setting)
        elif self._writer is not None:
            self._writer.close()
            self._writer = None
            _remove_experiment(self.run_dir)

    def close(self) -> None:
        """Complete the run; its files stay readable through this logger."""
        self._recorder = None
        if self._writer is not None:
            self._writer.close()

    def _sealed(self) -> Run:
        """The run as a log, with everything so far sealed."""
        if self._loose.rows:
            self._write_loose()
        if self._writer is None:
            raise RouterLogError(
                f"{self.run_dir}: nothing was logged; pass this logger to patch_with_bh and run "
                "the model first"
            )
        if self._recorder is not None:
            self._recorder.flush()
        if not self._writer.closed:
            self._writer.flush()
        return open_log(self.run_dir)

    def _write_loose(self) -> None:
        routing, kde = self._loose.setting
        layers = tuple(sorted(self._loose.rows))
        block, n_experts = self._loose.block(layers)
        info = ModelInfo(
            name="benjamini_hochberg_routing",
            class_name="",
            revision=None,
            layers=layers,
            n_experts=n_experts,
            top_k=n_experts,
            norm_topk_prob=True,
        )
        if kde is not None and not set(layers) <= set(kde):
            kde = None
        writer = self._begin(info, routing, kde)
        writer.submit(block)
        writer.close()


def _remove_experiment(folder: Path) -> None:
    """Remove an earlier run of a logger; anything else is refused."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / MANIFEST_NAME
    if not path.exists() or "experiment_name" not in (
        Manifest.from_json(path.read_bytes(), str(path)).options
    ):
        raise RunExists(f"{folder}: holds files that no logger wrote; choose another name")
    remove_run(folder)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(data, indent=1).encode() + b"\n")

"""One training run from end to end, under a progress bar: the examples in, the adapter's directory out."""

import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onebase_server.model.tokenizer import Tokenizer
from onebase_server.tuning.examples import Example, read_examples
from onebase_server.tuning.export import check_output, model_card, save_adapter
from onebase_server.tuning.recipe import Recipe
from onebase_server.tuning.trainer import Losses, Trainer, add_lora, evaluate, hold_out, load_base, mean_loss


def train_adapter(base: Path, data: Path, output: Path, recipe: Recipe, console: Console) -> Losses:
    """Train on the JSONL file `data` and write a PEFT directory to `output`; nothing is written before the end.

    Returns the losses of the last epoch.

    Raises:
        ConfigurationError: The base, the data, the recipe or `output` is wrong.
    """
    check_output(output)
    examples = read_examples(data, Tokenizer.from_directory(base), recipe.max_length)
    training, held_out = hold_out(examples, recipe)
    model = add_lora(load_base(base, recipe), recipe)
    losses = _train_all_epochs(Trainer(model, training, recipe), held_out, recipe, console)
    base_name = base.resolve().name
    card = model_card(base_name=base_name, data=data, num_examples=len(training), recipe=recipe, losses=losses)
    save_adapter(model, output, base_name=base_name, card=card)
    console.print(f"Wrote {output}.", highlight=False)
    return losses


def _train_all_epochs(trainer: Trainer, held_out: list[Example], recipe: Recipe, console: Console) -> Losses:
    losses = Losses(training=math.nan)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, learning rate {task.fields[learning_rate]:.1e}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("", total=trainer.num_steps, loss=math.nan, learning_rate=0.0)
        for epoch in range(1, recipe.epochs + 1):
            progress.update(bar, description=f"epoch {epoch}/{recipe.epochs}")
            started = time.perf_counter()
            steps = []
            for step in trainer.run_epoch():
                steps.append(step)
                progress.update(bar, advance=1, loss=step.loss, learning_rate=step.learning_rate)
            speed = sum(step.num_tokens for step in steps) / (time.perf_counter() - started)
            losses = Losses(
                training=mean_loss(steps),
                held_out=evaluate(trainer.model, held_out, recipe.batch_size) if held_out else None,
            )
            console.print(f"epoch {epoch}/{recipe.epochs}: {losses}, {speed:.0f} tokens/s", highlight=False)
    return losses

"""Our server, and what is asked of it here."""

import io
import json
import os
import zipfile
from pathlib import Path

import model
from server import Server

BATCH = 8


class Lab(Server):
    def train(self, base, adapter, rows, held_out, steps, training, seed):
        """The name of the tuned model and the loss on what is held out."""
        body = {"model": base, "training_file": self.upload(rows), "validation_file": self.upload(held_out), "seed": seed,
                "adapter": adapter,
                "training": {"batch_size": BATCH, "lr_scheduler": "linear", "max_steps": steps, "eval_every": steps,
                             "n_epochs": steps * BATCH // len(rows) + 1, **training}}
        job, metrics, _ = self.run(body)
        assert len(metrics) == steps, f"{len(metrics)} steps of {steps}"
        return job["fine_tuned_model"], metrics[-1]["full_valid_loss"]

    def files(self, name):
        packed = self.ask(f"/v1/adapters/{name}/download")
        inside = zipfile.ZipFile(io.BytesIO(packed))
        return json.loads(inside.read("adapter_config.json")), model.load(inside.read("adapter_model.safetensors"))

    def methods(self):
        return {card["id"] for card in self.json("/v1/methods")["data"]}

    def seconds(self):
        """Processor time so far, which other programs on the machine do not change much."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

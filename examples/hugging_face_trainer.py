"""Eva-f in Hugging Face's Trainer: ``python examples/hugging_face_trainer.py``.

Trainer calls the class with the parameters and these options. With ``"model"`` the optimizer takes
all parameters of the model by their names, and recognises embeddings and heads by their modules.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from titan_shampoo import EvaF

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))

starts = torch.randint(64, (256,)).tolist()
texts = [torch.arange(start, start + 32) % 64 for start in starts]  # the next token is one more
samples = [{"input_ids": text, "labels": text} for text in texts]

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder, max_steps=30, per_device_train_batch_size=16, logging_steps=10, report_to=[]
        ),
        train_dataset=samples,
        optimizer_cls_and_kwargs=(
            EvaF,
            {"model": model, "lr": 0.1, "damping_mode": "relative", "fallback_lr": 1e-2},
        ),
    )
    trainer.train()
for record in trainer.state.log_history:
    if "loss" in record:
        print(f"step {record['step']}  loss {float(record['loss']):.3f}")

"""Supervised fine-tuning by TRL under a patch, with short texts packed into rows. Needs trl: pip install trl.

The trainer saves the plan with the adapter. `load_adapter` opens the result in another process.
"""

from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_posext import load_adapter, patch_model

HERE = Path(__file__).parent

tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny" / "tiny-rope")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(HERE / "tiny" / "tiny-rope")
patch_model(model, "yarn", factor=2, tokenizer=tokenizer)

rows = load_dataset("json", data_files=str(HERE / "data" / "validation.jsonl"), split="train[:2]")
settings = {"max_steps": 4, "learning_rate": 1e-3, "report_to": "none"}
if not torch.cuda.is_available():
    settings |= {"use_cpu": True, "bf16": False}  # TRL would train in bfloat16 on a GPU
arguments = SFTConfig("reports/sft", packing=True, max_length=1024, **settings)
adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
trainer.train()
trainer.save_model("reports/sft/final")

model = load_adapter("reports/sft/final")
prompt = tokenizer("It was", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))

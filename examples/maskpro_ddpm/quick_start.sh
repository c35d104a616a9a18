#!/usr/bin/env bash
# Learns masks by one of the five presets of presets.toml, after the steps before it where they are missing.
#   examples/maskpro_ddpm/quick_start.sh             asks which
#   examples/maskpro_ddpm/quick_start.sh 1           or by the number or the name, for scripts
# ORIGINAL_MODEL names the model (auto), PYTHON the Python. All goes to output/maskpro_ddpm in the repository.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/maskpro_ddpm out=output/maskpro_ddpm
modes=(1_quick 2_standard 3_best 4_throughput 5_finetune)
about=("500 steps, to try it" "2000 steps" "10000 steps" "2000 steps of many images" "masks, then their weights")

mode=${1-}
if [ -z "$mode" ]; then
  for i in "${!modes[@]}"; do printf '%-14s %s\n' "${modes[i]}" "${about[i]}"; done
  read -r -p 'which (1 to 5)? ' mode
fi
for each in "${modes[@]}"; do
  if [ "$mode" = "${each%%_*}" ] || [ "$mode" = "$each" ]; then preset=$each; fi
done
if [ -z "${preset-}" ]; then
  echo "the mode must be 1 to 5 or one of ${modes[*]}, got '$mode'" >&2
  exit 2
fi

if [ -z "${PYTHON-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
model=(--original_model "${ORIGINAL_MODEL:-auto}")
if [ ! -e $out/initial_mask_diffusion/masks.safetensors ]; then
  "$PYTHON" $here/weight_prune.py "${model[@]}"
  "$PYTHON" $here/get_mask_diffusion.py "${model[@]}"
fi
"$PYTHON" -m sparsekit_command sweep $here/presets.toml --out $out/presets --only "$preset"
if [ "$preset" = 5_finetune ]; then
  "$PYTHON" $here/finetune.py "${model[@]}" --mask_path "$out/presets/$preset/learned_mask"
fi

#!/usr/bin/env bash
# Learns masks by one of the five presets of presets.toml, after the steps before it where they are missing.
#   examples/maskpro_ddpm/quick_start.sh             asks which
#   examples/maskpro_ddpm/quick_start.sh 1           or by the number or the name, for scripts
# ORIGINAL_MODEL names the model (auto), PYTHON the Python. All goes to a folder named by the model in OUT, which is
# output/maskpro_ddpm in the repository unless it is set.
set -euo pipefail
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

model=${ORIGINAL_MODEL:-auto}
if [ -d "$model" ]; then model=$(cd "$model" && pwd); fi
cd "$(dirname "$0")/../.."
here=examples/maskpro_ddpm
name=${model//[^[:alnum:]._-]/-}
out=${OUT:-output/maskpro_ddpm}/${name#-}
if [ -z "${PYTHON-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi

masks=$out/initial_mask_diffusion
if [ -e "$masks/masks.safetensors" ]; then
  echo "begins with the masks in $masks; remove that folder to prune again"
else
  "$PYTHON" $here/weight_prune.py --original_model "$model" --save_path "$out/pruned"
  "$PYTHON" $here/get_mask_diffusion.py --original_model "$model" --model_path "$out/pruned" --output_dir "$masks"
fi
mkdir -p "$out"
{
  printf "args = ['--original_model', '%s', '--initial_mask_path', '%s', " "$model" "$masks"
  printf "'--baseline_path', '%s']\n" "$out/baseline_losses"
  cat $here/presets.toml
} >"$out/presets.toml"
"$PYTHON" -m sparsekit_command sweep "$out/presets.toml" --out "$out/presets" --only "$preset"
if [ "$preset" = 5_finetune ]; then
  "$PYTHON" $here/finetune.py --original_model "$model" --mask_path "$out/presets/$preset/learned_mask" \
    --out "$out/finetuned"
fi

#!/usr/bin/env bash
# scripts/demo.sh
# Run a distillation on real speech from end to end: speech, teacher, growing student, exports, report.
# Everything is written to outputs/demo. After an interruption, run it again to resume.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
source "$(dirname "$0")/environment.sh"
run=outputs/demo
speech=$run/speech
teacher=$run/teacher/teacher.pt
checkpoint=$run/checkpoints/checkpoint_last.pt
mkdir -p "$run"
# fairseq and hydra cause deprecation warnings, which do not concern users of the demo.
export PYTHONWARNINGS=ignore HF_HUB_DISABLE_PROGRESS_BARS=1

step() { echo; echo "== $*"; }

step "1/5 Speech: Debian's recorded prompts, as 16 kHz audio with manifests"
[ -e "$speech/test.tsv" ] || fairseq-stack prepare --source asterisk --output "$speech"

step "2/5 Teacher: a small HuBERT, pre-trained by fairseq on this speech"
python examples/demo_teacher/make_demo_teacher.py --speech "$speech" --output "$run/teacher"

step "3/5 Distillation: 3, 6, 9, 12 layers"
fairseq-hydra-train --config-dir examples/interleaved --config-name demo_fast \
  task.data="$speech" task.teacher="$teacher"

step "4/5 Exports, each compared with the training model on real speech"
for target in huggingface s3prl; do
  output=$run/student_$target
  [ "$target" = s3prl ] && output=$output.pt
  [ "$output" -nt "$checkpoint" ] && { echo "$output is there already"; continue; }
  fairseq-stack export "$checkpoint" --to "$target" --output "$output" --speech "$speech/test.tsv" --force
done

step "5/5 Report"
fairseq-stack report "$run" --output "$run/report" --student "$run/student_huggingface" --speech "$speech/test.tsv"
fairseq-stack held-out "$checkpoint" --speech "$speech/test.tsv" | tee "$run/report/held_out.md"

cat <<END

== Done
  $checkpoint       fairseq's checkpoint of the student
  $run/student_huggingface/            for transformers.HubertModel.from_pretrained and s3prl's hf_hubert_custom
  $run/student_s3prl.pt                for s3prl's hubert_local
  $run/report/index.html               losses, growth, time per stage, layer similarity

Next, LibriSpeech and HuBERT Base:
  source .venv/bin/activate
  fairseq-stack prepare --source /path/to/LibriSpeech --output /path/to/manifests
  fairseq-hydra-train --config-dir examples/interleaved --config-name librispeech_base \\
    task.data=/path/to/manifests task.teacher=/path/to/hubert_base_ls960.pt
END

#!/usr/bin/env bash
# The runs of docs/study/length.md, in order: prints name, tab, command of all that can start and are not
# finished. An interrupted run is continued. From the repository's folder, two at a time, until nothing is printed:
#     bash docs/study/commands.sh FASHIONMNIST HELD_OUT RUNS | cut -f 2 | xargs -P 2 -d '\n' -n 1 bash -c
# FASHIONMNIST: folder with the set's four files; HELD_OUT: folder written by hold_out.py; RUNS: folder for the results
set -euo pipefail
data="--data fashionmnist --data-root $(realpath "$1")" held="--data fashionmnist --data-root $(realpath -m "$2")"
mkdir -p "$3"
runs=$(realpath "$3") one="export OMP_NUM_THREADS=1;"

pretrain() { # name, seed, flags: pre-train, then evaluate the features on the test images
    local run=$runs/$1-$2
    [ -f "$run/knn.txt" ] || printf '%s\t%s\n' "$1-$2" "$one if [ -f $run/last.pt ]; \
then python pretrain.py --resume $run/last.pt; \
else python pretrain.py $data --knn-every 10 --seed $2 --out $run ${*:3}; fi >> $run.log 2>&1 \
&& python evaluate.py $run/last.pt --knn $data > $run/knn.tmp 2>> $run.log && mv $run/knn.tmp $run/knn.txt"
}

finetune() { # images (data or held), name of the pre-training or scratch, seed, name, flags
    local run=$runs/$2-$3-$4 init="--init $runs/$2-$3/last.pt"
    [ "$2" != scratch ] || init="--init none --layer-decay 1"
    [ "$2" = scratch ] || [ -f "$runs/$2-$3/knn.txt" ] || return 0
    [ -f "$run/done" ] || printf '%s\t%s\n' "$2-$3-$4" "$one [ -f $run/last.pt ] && again='--resume $run/last.pt'; \
python finetune.py \${again:-${!1} $init --seed $3 --out $run ${*:5}} >> $run.log 2>&1 && touch $run/done"
}

# Length: the pre-training of the README's example, and MAE at equal compute
for seed in 0 1 2; do
    pretrain short $seed --limit 20000 --epochs 10
    pretrain mae-short $seed --limit 20000 --epochs 9 --method mae --blr 16e-3
done

# Question 1, with the learning rates that the first study chose
for length in 40 10 20 60; do
    for seed in 0 1 2; do
        pretrain pcae-$length $seed --epochs $length --blr 8e-3
        pretrain mae-$((length * 9 / 10)) $seed --method mae --epochs $((length * 9 / 10)) --blr 16e-3
    done
done

# Question 2, on held-out images: fraction of 50,000 labels (0.012: 600), peak learning rate in thousandths, batch size,
# epochs, passes per epoch
few() { # pre-training or scratch, seed, then these
    local blr; blr=$(awk "BEGIN { print 0.256 * $4 / $5 }") # per 256 images
    finetune held "$1" "$2" "heldout-$3-lr$4-b$5-e$6-x$7" --label-fraction "$3" --blr "$blr" --batch-size "$5" \
        --epochs "$6" --repeats "$7"
}
for seed in 0 1; do
    for peak in 1 2 4; do few short $seed 0.012 $peak 64 10 11; done
    few short $seed 0.012 2 64 10 5
    few short $seed 0.012 2 64 10 21
    few short $seed 0.012 1 64 10 1
    few short $seed 0.012 2 8 10 1
    few scratch $seed 0.012 2 64 10 21
done
few short 0 0.012 4 64 10 21
for setting in "1 8 10" "4 8 10" "2 8 20" "2 4 10" "2 16 20"; do few short 0 0.012 $setting 1; done
for setting in "2 64 10 11" "4 64 10 21"; do few scratch 0 0.012 $setting; done
for peak in 1 2 4; do few short 0 0.12 $peak 64 10 1; few short 0 1 $peak 64 2 1; done
for peak in 2 4; do few short 0 0.12 $peak 64 10 2; done

# Questions 2 and 4, on the test images
for seed in 0 1 2; do
    for name in short scratch pcae-40 mae-36; do finetune data $name $seed labels-0.01 --label-fraction 0.01; done
done

# Question 4, on held-out images (100 % of the labels), then on the test images with the rates chosen
full=(pcae-10=1.6e-2 mae-9=1.6e-2 scratch=8e-3)
for peak in 2 4 8; do for name in pcae-10 mae-9 scratch; do few $name 0 1 $peak 64 2 1; done; done
for seed in 0 1 2; do
    for chosen in "${full[@]}"; do
        finetune data "${chosen%=*}" $seed labels-0.1 --label-fraction 0.1
        finetune data "${chosen%=*}" $seed labels-1 --epochs 2 --blr "${chosen#*=}"
    done
done

# Question 3: patches of 2. MAE costs 1.24 times as much per step as PCAE, without PTR it is 1.90. `knn` and `ridge` of
# metrics.jsonl chose the learning rates
two="--limit 20000 --patch-size 2"
for blr in 8e-3 16e-3 32e-3; do
    pretrain two-pcae-$blr 0 $two --epochs 10 --blr $blr
    pretrain two-mae-$blr 0 $two --method mae --epochs 8 --blr $blr
done
for seed in 0 1 2; do
    pretrain two-pcae $seed $two --epochs 10 --blr 16e-3
    pretrain two-mae $seed $two --method mae --epochs 8 --blr 16e-3
    pretrain two-random $seed $two --epochs 10 --blr 16e-3 --criterion random
    pretrain two-frozen $seed $two --epochs 10 --blr 16e-3 --ema 1
    pretrain two-no-ptr $seed $two --epochs 5 --blr 16e-3 --drop-ratio 0
done

# Question 5, in two clones, ../mean and ../whole, whose model.py is changed as length.md says
threads=$one
for seed in 0 1 2; do
    one="cd $(realpath -m ../mean); $threads"; [ ! -d ../mean ] || pretrain mean $seed --limit 20000 --epochs 10
    one="cd $(realpath -m ../whole); $threads"; [ ! -d ../whole ] || pretrain whole $seed --limit 20000 --epochs 9
done
one=$threads

# Question 6. Learning rates are tuned on 100 scenes and evaluated on others than the test scenes
here=$(realpath "${BASH_SOURCE[0]%/*}")
detect() { # shapes or scratch, seed, scenes, split, learning rate
    local run=$runs/$1-$2-scenes-$3-$4-blr$5 init="--init $runs/shapes-$2/last.pt"
    [ "$1" != scratch ] || init="--init none --layer-decay 1"
    [ -f "$run/done" ] || printf '%s\t%s\n' "${run##*/}" "$one \
python detect.py --resume --data $runs/scenes-$3-$4 $init --blr $5 --seed $2 --out $run >> $run.log 2>&1 && touch $run/done"
}
for scenes in 100-tune 50-val 100-val 200-val; do
    [ -d "$runs/scenes-$scenes" ] || printf '%s\t%s\n' "scenes-$scenes" \
        "PYTHONPATH=. python $here/scenes.py $runs/scenes-$scenes ${scenes/-/ }"
done
for seed in 0 1 2; do
    [ -f "$runs/shapes-$seed/done" ] || printf '%s\t%s\n' "shapes-$seed" "$one \
python pretrain.py --resume --seed $seed --out $runs/shapes-$seed >> $runs/shapes-$seed.log 2>&1 && touch $runs/shapes-$seed/done"
done
[ -f "$runs/shapes-0/done" ] && [ -d "$runs/scenes-100-tune" ] || exit 0
for blr in 3.2e-2 6.4e-2; do for start in shapes scratch; do detect $start 0 100 tune $blr; done; done
for scenes in 100 50 200; do for seed in 0 1 2; do
    for start in shapes scratch; do detect $start $seed $scenes val 6.4e-2; done
done; done

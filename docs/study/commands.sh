#!/usr/bin/env bash
# The runs of docs/study/length.md, most important first: name, tab, command. Prints only what is not finished; an interrupted
# one goes on where it stopped.
#     bash docs/study/commands.sh FASHIONMNIST HELD_OUT RUNS | cut -f 2 | xargs -P 2 -d '\n' -n 1 bash -c
# FASHIONMNIST: folder with the set's four files; HELD_OUT: folder written by hold_out.py; RUNS: folder for the results
set -euo pipefail
data="--data fashionmnist --data-root $1" held="--data fashionmnist --data-root $2" runs=$3 one="export OMP_NUM_THREADS=1;"
mkdir -p "$runs"

pretrain() { # name, seed, flags: pre-train, then score on the test images
    local run=$runs/$1-$2
    [ -f "$run/knn.txt" ] || printf '%s\t%s\n' "$1-$2" "$one if [ -f $run/last.pt ]; \
then python pretrain.py --resume $run/last.pt; \
else python pretrain.py $data --knn-every 10 --seed $2 --out $run ${*:3}; fi >> $run.log 2>&1 \
&& python evaluate.py $run/last.pt --knn $data > $run/knn.tmp 2>> $run.log && mv $run/knn.tmp $run/knn.txt"
}

finetune() { # images (data or held), name of the pre-training or scratch, seed, name, flags
    local run=$runs/$2-$3-$4 init="--init $runs/$2-$3/last.pt"
    [ "$2" != scratch ] || init="--init none --layer-decay 1"
    [ "$2" = scratch ] || [ -f "$runs/$2-$3/held-out.txt" ] || return 0
    [ -f "$run/done" ] || printf '%s\t%s\n' "$2-$3-$4" "$one [ -f $run/last.pt ] && again='--resume $run/last.pt'; \
python finetune.py \${again:-${!1} $init --seed $3 --out $run ${*:5}} >> $run.log 2>&1 && touch $run/done"
}

# The pre-training of the README's example, for question 2
for seed in 0 1 2; do pretrain short $seed --limit 20000 --epochs 10; done

# Question 2: peak learning rate in thousandths, batch size, epochs. --blr is per 256 images
few() { # pre-training or scratch, seed, fraction, peak, batch size, epochs, images per epoch: labels are repeated until an
    # epoch has that many. ../study-code-few: finetune.py patched to do that, and to score only after the last epoch
    local blr name=heldout-$3-lr$4-b$5-e$6; blr=$(awk "BEGIN { print 0.256 * $4 / $5 }")
    finetune held $1 $2 $name${7:+-m$7} --label-fraction $3 --blr $blr --batch-size $5 --epochs $6 |
        sed "s#python finetune#cd ../study-code-few \&\& EPOCH_IMAGES=${7:-0} &#"
}
for seed in 0 1; do # 0.012 of 50,000: 600
    for peak in 1 2; do few short $seed 0.012 $peak 64 10 6400; done
    few short $seed 0.012 2 64 10 3200
    few short $seed 0.012 1 64 10
    few short $seed 0.012 2 8 10
done
for peak in 1 2 4; do few short 0 0.12 $peak 64 10; done # 6,000
for peak in 2 4 1; do few short 0 1 $peak 64 2; done # 50,000
few short 0 0.12 2 64 10 12800
few short 0 0.012 2 64 10 12800
for seed in 0 1; do few short $seed 0.012 4 64 10 6400; done
few scratch 0 0.012 2 64 10 6400
for labels in 0.12 0.012; do few short 0 $labels 4 64 10 12800; done
few scratch 0 0.012 2 64 10 12800
few short 1 0.012 2 64 10 12800
few scratch 0 0.012 4 64 10 12800
few scratch 1 0.012 2 64 10 12800
few scratch 0 0.012 1 64 10 12800
for labels in 0.12 0.012; do few short 0 $labels 2 64 10 25600; done
for peak in 2 4; do few short 0 1 $peak 64 10; done
# One seed: time was short, and these lose
few short 0 0.012 2 8 20
for peak in 1 4; do few short 0 0.012 $peak 8 10; done
few short 0 0.012 2 4 10
few short 0 0.012 2 16 20

# Question 1, with the learning rates that the first study chose
pcae=8e-3 mae=16e-3
for length in 40 10 20 60; do
    for seed in 0 1 2; do
        epochs=$((length * 9 / 10))
        pretrain pcae-$length $seed --epochs $length --blr $pcae
        pretrain mae-$epochs $seed --method mae --epochs $epochs --blr $mae
    done
done

# Question 3: patches of 2. MAE costs 1.24 times as much per step, no PTR 1.90, PCAE's second decoder block 1.19, MAE's 1.56
two="--limit 20000 --patch-size 2" pcae2="" mae2=""
for blr in 8e-3 4e-3 16e-3; do pretrain two-pcae-$blr 0 $two --epochs 10 --blr $blr; done
for blr in 16e-3 8e-3 32e-3 4e-3 64e-3; do pretrain two-mae-$blr 0 $two --method mae --epochs 8 --blr $blr; done
if [ "$pcae2" ]; then
    for ema in 0.99 0.999; do pretrain two-pcae-ema$ema 0 $two --epochs 10 --blr $pcae2 --ema $ema; done
    pretrain two-pcae-decoder2 0 $two --epochs 8 --blr $pcae2 --decoder-depth 2
    pretrain two-mae-decoder2 0 $two --method mae --epochs 5 --blr $mae2 --decoder-depth 2
    for seed in 0 1 2; do # with what was chosen
        pretrain two-pcae-$pcae2 $seed $two --epochs 10 --blr $pcae2
        pretrain two-mae-$mae2 $seed $two --method mae --epochs 8 --blr $mae2
        pretrain two-random $seed $two --epochs 10 --blr $pcae2 --criterion random
        pretrain two-frozen $seed $two --epochs 10 --blr $pcae2 --ema 1
        pretrain two-no-ptr $seed $two --epochs 5 --blr $pcae2 --drop-ratio 0
        for name in pcae-$pcae2 mae-$mae2 random frozen no-ptr; do score two-$name $seed; done
    done
fi

# Question 5: model.py patched (the two diffs in length.md) in ../study-code-mean and ../study-code-whole. The whole image costs
# 1.18 times as much per step
if [ "$pcae" ]; then
    for seed in 0 1 2; do
        pretrain mean-20 $seed --epochs 20 --blr $pcae | sed 's#python pretrain#cd ../study-code-mean; &#'
        pretrain whole-17 $seed --epochs 17 --blr $pcae | sed 's#python pretrain#cd ../study-code-whole; &#'
        for name in mean-20 whole-17; do score $name $seed; done
    done
fi

# Question 6. The learning rate is tuned on 100 scenes and scored on others than the test scenes
detect() { # shapes or scratch, seed, scenes, split, learning rate
    local run=$runs/$1-$2-scenes-$3-$4-blr$5 init="--init $runs/shapes-$2/last.pt"
    [ "$1" != scratch ] || init="--init none --layer-decay 1"
    [ -f "$run/done" ] || printf '%s\t%s\n' "${run##*/}" "$one [ -d $runs/scenes-$3-$4 ] \
|| PYTHONPATH=. python $here/scenes.py $runs/scenes-$3-$4 $3 $4; \
python detect.py --data $runs/scenes-$3-$4 $init --blr $5 --seed $2 --out $run > $run.log 2>&1 && touch $run/done"
}
here=$(realpath "${BASH_SOURCE[0]%/*}") detection="" scratch=""
for seed in 0 1 2; do
    [ -f "$runs/shapes-$seed/done" ] || printf '%s\t%s\n' "shapes-$seed" "$one \
python pretrain.py --seed $seed --out $runs/shapes-$seed > $runs/shapes-$seed.log 2>&1 && touch $runs/shapes-$seed/done"
done
if [ -f "$runs/shapes-0/done" ]; then
    for blr in 3.2e-2 1.6e-2 6.4e-2; do for start in shapes scratch; do detect $start 0 100 tune $blr; done; done
fi
if [ "$detection" ]; then
    for scenes in 100 50 200; do for seed in 0 1 2; do
        detect shapes $seed $scenes val $detection
        detect scratch $seed $scenes val $scratch
    done; done
fi

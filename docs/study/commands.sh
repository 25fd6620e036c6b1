#!/usr/bin/env bash
# The study's runs, one line each: bash docs/study/commands.sh FOLDER | xargs -P 2 -d '\n' -n 1 bash -c
# FOLDER holds Fashion-MNIST's four files. What is done already is left out.
set -euo pipefail
data="--data fashionmnist --data-root $1" unit="--limit 20000 --epochs 10 --knn-every 10" one="OMP_NUM_THREADS=1"
out=runs/study
mkdir -p $out

pretrain() { # name, seed, flags
    local run=$out/$1-$2
    [ -f "$run/knn.txt" ] || echo "$one python pretrain.py $data $unit --seed $2 --out $run ${*:3} > $run.log 2>&1 \
&& $one python finetune.py $data --limit 20000 --knn --init $run/last.pt > $run/knn.tmp 2>> $run.log && mv $run/knn.tmp $run/knn.txt"
}

finetune() { # name of the pre-training, seed, name, flags
    local run=$out/$1-$2 init="--init $out/$1-$2/last.pt"
    [ "$1" != scratch ] || init="--init none --layer-decay 1"
    [ -f "$run-$3/done" ] || echo "$one python finetune.py $data $init --seed $2 --out $run-$3 ${*:4} \
> $run-$3.log 2>&1 && touch $run-$3/done"
}

# Question 0, by metrics.jsonl alone
if [ "${2:-}" = tune ]; then
    for seed in 0 1; do
        for ema in 0.99 0.997 0.999 0.9999 1; do echo pcae-ema$ema $seed --ema $ema; done
        for blr in 4e-3 16e-3; do echo pcae-blr$blr $seed --ema 0.99 --blr $blr; done
        for blr in 4e-3 8e-3 16e-3 32e-3; do echo mae-blr$blr $seed --method mae --epochs 9 --knn-every 9 --blr $blr; done
        for blr in 4e-3 8e-3 16e-3 32e-3; do echo simmim-blr$blr $seed --method simmim --epochs 4 --knn-every 4 --blr $blr; done
    done | while read -r name seed flags; do
        run=$out/tune/$name-$seed
        [ -f "$run/done" ] || echo "$one python pretrain.py $data $unit $flags --seed $seed --out $run > /dev/null 2>&1 \
&& touch $run/done"
    done
    exit
fi

# Questions 1 to 7. What question 0 chose: for PCAE the defaults, a momentum of .99
pcae="" mae="--method mae --epochs 9 --knn-every 9 --blr 16e-3" simmim="--method simmim --epochs 4 --knn-every 4 --blr 32e-3"
for seed in 0 1 2; do
    pretrain pcae $seed $pcae
    pretrain mae $seed $mae
    pretrain frozen $seed $pcae --ema 1
    pretrain no-ptr-equal-compute $seed $pcae --epochs 6 --knn-every 6 --drop-ratio 0
    pretrain simmim $seed $simmim
done
for seed in 0 1 2; do
    pretrain ema.9999 $seed $pcae --ema 0.9999
    pretrain random $seed $pcae --criterion random
    pretrain reverse $seed $pcae --criterion reverse
    pretrain no-ptr $seed $pcae --drop-ratio 0
    pretrain decoder-2 $seed $pcae --decoder-depth 2
done
for seed in 0 1 2; do
    pretrain mask-.85 $seed $pcae --mask-ratio 0.85
    pretrain mask-.85-equal-compute $seed $pcae --mask-ratio 0.85 --epochs 13 --knn-every 13
    pretrain stage-1 $seed $pcae --drop-stages 1 --drop-ratio 0.875
    pretrain ratio-.37 $seed $pcae --drop-ratio 0.37
    pretrain decoder-4 $seed $pcae --decoder-depth 4
done

# 1 % of the labels: 750 steps. The rate was chosen among three on one pre-training; scratch has two
few="--label-fraction 0.01 --batch-size 8 --epochs 10"
for seed in 0 1 2; do
    for name in pcae mae simmim frozen; do finetune $name $seed one-percent $few --blr 64e-3; done
    finetune pcae $seed one-percent-ptr $few --blr 64e-3 --drop-ratio 0.3
    for blr in 32e-3 64e-3; do finetune scratch $seed one-percent-$blr $few --blr $blr; done
done

# Question 8, when these are done: a table each
for run in $out/pcae-[012]-one-percent*/; do
    [ ! -f "$run/last.pt" ] || echo "$one python finetune.py --eval $run/last.pt --drop-ratio 0 0.1 0.2 0.3 0.4 > $run/ptr.txt"
done

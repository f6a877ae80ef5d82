"""Pre-train an encoder from unlabelled images alone, by MAE or data2vec 2.0.

    accelerate launch training/pretrain.py --recipe pretrain-digits --output_dir outputs/digits-mae
    accelerate launch training/pretrain.py --dataset my_images/ --image_size 64 --patch_size 8 \\
        --hidden_size 192 --num_hidden_layers 12 --num_attention_heads 3 --epochs 200 \\
        --batch_size 256 --output_dir outputs/my-mae

The result is a model folder that `training/refine.py --model` takes. The same command goes on
where it was stopped. Large encoders are better started from published weights.
"""

from mim_refiner_hf.cli import command

if __name__ == "__main__":
    raise SystemExit(command("pretrain"))

"""Train, look and measure in ten lines: python examples/ten_lines.py"""

import movae_fast

if __name__ == "__main__":  # worker processes import this file again
    run = movae_fast.train(
        dataset="digits", arch="vae", agg="upgrad", image_size=16, hidden_dims=[16, 32], epochs=2
    )
    model = movae_fast.load(run)
    images = model.sample(16, seed=0)  # [16, 1, 16, 16] in [0, 1]
    latents = model.encode(images)  # [16, 128]
    print(f"{run.folder}: {(model.decode(latents) - images).square().mean():.4f} squared error per value")
    print(movae_fast.evaluate(run, "objectives"))

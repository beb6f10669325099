//! Trains a small convolutional net on handwritten digits, on several processes at once.
//!
//! `cargo run --release --example train_digits -- --nproc 2`, or `cargo xtask demo`. Every rank runs `train`: it
//! joins the process group, wraps the net in `DistributedDataParallel`, and sees its share of each batch.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel, DistributedSampler};

#[path = "digits/checkpoint.rs"]
mod checkpoint;
#[path = "common/digits.rs"]
#[allow(unreachable_pub, reason = "shared by several examples")]
mod digits;
#[path = "common/plot.rs"]
#[allow(unreachable_pub, reason = "shared by several examples")]
mod plot;
#[path = "digits/progress.rs"]
mod progress;
#[path = "digits/sgd.rs"]
mod sgd;

use checkpoint::{Checkpoint, Epoch};
use digits::Digits;
use progress::Progress;
use sgd::Sgd;

/// Trains a small convolutional net on handwritten digits, data-parallel.
#[derive(Clone, Parser)]
struct Args {
    /// How many processes train together.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    nproc: u16,
    /// The engine that moves the gradients: native or gloo.
    #[arg(long, default_value = "native")]
    backend: String,
    /// How many epochs in all.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    epochs: u16,
    /// How many images a step takes, over all ranks.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// The learning rate of the first epoch; each epoch's is 0.85 of the one before.
    #[arg(long, default_value_t = 0.06)]
    lr: f64,
    /// The seed of the weights and of the order of the images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the model, the checkpoint and the picture go.
    #[arg(long, default_value = "target/train_digits")]
    out: PathBuf,
    /// Goes on where the last run with this folder stopped.
    #[arg(long)]
    resume: bool,
}

fn main() -> dist::Result<()> {
    let args = Args::parse();
    let trained_as = Cell::new(None);
    dist::launch::local(usize::from(args.nproc), || {
        trained_as.set(Some(train(&args)?));
        Ok::<(), dist::Error>(())
    })?;
    // The process that started the ranks has trained nothing and speaks for them. Under torchrun, mpirun or srun
    // there is none: there rank 0 speaks.
    match trained_as.get() {
        None | Some(0) => report(&args.out),
        Some(_) => Ok(()),
    }
}

/// What every rank does; gives its rank.
fn train(args: &Args) -> dist::Result<usize> {
    let patience = dist::InitOptions::new().timeout(Duration::from_secs(60));
    let group = dist::init_process_group(args.backend.as_str(), patience)?;
    let is_first = group.rank() == 0;
    let (training, held_out) = digits::load().map_err(other)?.split();

    tch::manual_seed(args.seed as i64);
    let vs = nn::VarStore::new(Device::Cpu);
    let net = net(&vs.root());
    let mut optimizer = Sgd::new(&vs, args.lr, 0.9);
    let mut history = match args.resume {
        true => Checkpoint::load(&args.out)?.restore(&vs, &mut optimizer)?,
        false => Vec::new(),
    };
    let model = DistributedDataParallel::new(net, &vs, &group, DdpOptions::new())?;

    let mut sampler =
        DistributedSampler::new(training.len() as usize, &group).seed(args.seed).drop_last(true);
    let share = (args.batch_size / group.size()).max(1);
    let steps = sampler.len().div_ceil(share);
    let epochs = usize::from(args.epochs);
    let progress = Progress::new(epochs.saturating_sub(history.len()) * steps, is_first);
    for epoch in history.len()..epochs {
        let start = Instant::now();
        sampler.set_epoch(epoch as u64);
        optimizer.lr = args.lr * 0.85f64.powi(epoch as i32);
        let mut total_loss = Tensor::zeros([], (Kind::Double, Device::Cpu));
        for (step, batch) in sampler.indices().chunks(share).enumerate() {
            let Digits { images, labels } = training.select(batch);
            let images = moved(&images, epoch + step + group.rank());
            let loss = model.forward(&images)?.cross_entropy_for_logits(&labels);
            optimizer.zero_grad();
            model.backward(&loss)?; // gradients are averaged while backward runs
            optimizer.step();
            total_loss += loss.detach().to_kind(Kind::Double) * batch.len() as f64;
            progress.step();
        }
        let (loss, samples) = mean(&total_loss, sampler.len(), &group)?;
        let accuracy = evaluate(model.module(), &held_out, &group)?;
        let rate = samples / start.elapsed().as_secs_f64();
        history.push(Epoch { loss, accuracy });
        if is_first {
            progress.say(&format!(
                "epoch {:>3}/{}  loss {loss:.4}  held-out {accuracy:.1} %  {rate:.0} samples/s",
                epoch + 1,
                epochs
            ));
            Checkpoint::take(&vs, &optimizer, &history).save(&args.out)?;
        }
    }
    progress.end();
    if is_first {
        vs.save(args.out.join("model.safetensors"))?;
        draw(&args.out, &history)?;
    }
    dist::destroy_process_group()?;
    Ok(group.rank())
}

/// The images moved by a pixel, or not, in one of nine ways: a digit stays what it is.
fn moved(images: &Tensor, way: usize) -> Tensor {
    let way = (way % 9) as i64;
    images.constant_pad_nd([1, 1, 1, 1]).narrow(2, way / 3, 8).narrow(3, way % 3, 8)
}

/// Two convolutions and two layers on top: some 56 thousand parameters.
fn net(root: &nn::Path) -> nn::Sequential {
    let padded = nn::ConvConfig { padding: 1, ..Default::default() };
    nn::seq()
        .add(nn::conv2d(root / "conv1", 1, 16, 3, padded))
        .add_fn(|x| x.relu())
        .add(nn::conv2d(root / "conv2", 16, 32, 3, padded))
        .add_fn(|x| x.relu().max_pool2d_default(2).flatten(1, -1))
        .add(nn::linear(root / "hidden", 32 * 4 * 4, 96, Default::default()))
        .add_fn(|x| x.relu())
        .add(nn::linear(root / "digits", 96, 10, Default::default()))
}

/// The mean loss over all ranks' samples, and how many there are.
fn mean(total: &Tensor, samples: usize, group: &dist::ProcessGroup) -> dist::Result<(f64, f64)> {
    let mut sums = Tensor::stack(&[total.shallow_clone(), Tensor::from(samples as f64)], 0);
    group.all_reduce(&mut sums, dist::ReduceOp::Sum)?;
    Ok((sums.double_value(&[0]) / sums.double_value(&[1]), sums.double_value(&[1])))
}

/// The share of held-out images that the net reads right, in percent: exactly, for each image goes to one rank
/// and what is added up are counts.
fn evaluate(net: &impl Module, held_out: &Digits, group: &dist::ProcessGroup) -> dist::Result<f64> {
    let mine = DistributedSampler::new(held_out.len() as usize, group).shuffle(false).even(false).indices();
    let Digits { images, labels } = held_out.select(&mine);
    let right = tch::no_grad(|| net.forward(&images).argmax(-1, false).eq_tensor(&labels).sum(Kind::Int64));
    let mut counts = Tensor::stack(&[right, Tensor::from(mine.len() as i64)], 0);
    group.all_reduce(&mut counts, dist::ReduceOp::Sum)?;
    Ok(100.0 * counts.int64_value(&[0]) as f64 / counts.int64_value(&[1]) as f64)
}

/// The loss curve, as a picture.
fn draw(out: &Path, history: &[Epoch]) -> dist::Result<()> {
    let points = history.iter().enumerate().map(|(epoch, e)| (epoch as f64 + 1.0, e.loss)).collect();
    let labels = plot::Labels { title: "handwritten digits", x: "epoch", y: "training loss" };
    plot::lines(&out.join("loss"), labels, &[plot::Series::line("loss", points)]).map_err(other)?;
    Ok(())
}

fn other(error: Box<dyn std::error::Error>) -> std::io::Error {
    std::io::Error::other(error.to_string())
}

/// The last lines.
fn report(out: &Path) -> dist::Result<()> {
    let history = Checkpoint::load(out)?.history()?;
    if let Some(last) = history.last() {
        println!("held-out accuracy: {:.1} %", last.accuracy);
    }
    println!("model:      {}", out.join("model.safetensors").display());
    println!("checkpoint: {} (go on with --resume)", out.join(checkpoint::FILE).display());
    println!("loss curve: {}", out.join("loss.svg").display());
    Ok(())
}

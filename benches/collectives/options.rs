//! The command line.

use std::path::PathBuf;

use tch::Kind;

use super::cases::{COLLECTIVES, Case, Collective, KINDS};
use super::crew::{ENGINES, Engine};
use super::targets;
use super::training::MODELS;

const USAGE: &str = "\
cargo xtask bench [options]
  --collectives LIST  of all_reduce, reduce, broadcast, all_gather, gather, scatter, reduce_scatter,
                      all_to_all, send_recv, barrier; or none (all of them)
  --sizes LIST        bytes of the larger buffer, with K, M or G (4,4K,64K,1M,16M,64M; a barrier has 0)
  --kinds LIST        of f32, f64, f16, bf16, i32, u8 (f32)
  --worlds LIST       numbers of ranks (2)
  --engines LIST      of native/shm, native/shm-allocated (tensors that the engine allocated), native/tcp,
                      native/threads, gloo/tcp, model/staged (what private tensors allow), openmpi/shm and
                      mpich/shm (where they are installed) (all there are)
  --train LIST        of mlp_25m, gpt_10m: steps of data-parallel training beside steps alone; tp_mlp:
                      tensor-parallel layers beside the same work alone plus their collectives (none)
  --rounds N          interleaved rounds (7)
  --float             ranks may change cores (else each native rank stays on one, where there are enough)
  --json FILE         the results, an array of objects
  --svg FILE          a plot of them
  --targets           what the targets speak of, 2 ranks and 4, training too; at the end which are met; the lists
                      above pick a part of it
  --quick             a few sizes and rounds, to see that it works";

/// What is measured if nothing else is asked for, in bytes.
const SIZES: [usize; 6] = [4, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];

#[derive(Debug)]
pub(crate) struct Options {
    collectives: Vec<Collective>,
    /// If they were chosen; so are the next three.
    sizes: Option<Vec<usize>>,
    kinds: Option<Vec<Kind>>,
    worlds: Option<Vec<usize>>,
    pub(crate) engines: Vec<Engine>,
    /// Which models to train.
    models: Option<Vec<&'static str>>,
    pub(crate) rounds: usize,
    /// How long an engine runs a case in one round.
    pub(crate) round_millis: u64,
    pub(crate) pin: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) svg: Option<PathBuf>,
    /// Measures what the targets speak of, and compares.
    pub(crate) targets: bool,
}

impl Options {
    pub(crate) fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self {
            collectives: COLLECTIVES.to_vec(),
            sizes: None,
            kinds: None,
            worlds: None,
            engines: ENGINES.to_vec(),
            models: None,
            rounds: 7,
            round_millis: 60,
            pin: true,
            json: None,
            svg: None,
            targets: false,
        };
        let mut arguments = arguments.iter();
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value\n{USAGE}"));
            match name.as_str() {
                "--help" => {
                    println!("{USAGE}");
                    std::process::exit(0);
                }
                // cargo adds this one.
                "--bench" => {}
                "--collectives" => {
                    options.collectives = match value()?.as_str() {
                        "none" => Vec::new(),
                        names => list(names, str::parse)?,
                    }
                }
                "--sizes" => options.sizes = Some(list(value()?, size)?),
                "--kinds" => options.kinds = Some(list(value()?, kind)?),
                "--worlds" => options.worlds = Some(list(value()?, number)?),
                "--engines" => options.engines = list(value()?, engine)?,
                "--train" => {
                    options.models = Some(match value()?.as_str() {
                        "none" => Vec::new(),
                        names => list(names, model)?,
                    });
                }
                "--rounds" => options.rounds = number(value()?)?,
                "--float" => options.pin = false,
                "--json" => options.json = Some(value()?.into()),
                "--svg" => options.svg = Some(value()?.into()),
                "--targets" => options.targets = true,
                "--quick" => {
                    options.sizes = Some(vec![4, 64 << 10, 1 << 20]);
                    options.rounds = 2;
                    options.round_millis = 5;
                }
                _ => return Err(format!("{name:?} is no option\n{USAGE}")),
            }
        }
        if options.rounds == 0 || options.worlds().iter().any(|&w| w < 2) {
            return Err("at least one round, and at least two ranks".to_owned());
        }
        Ok(options)
    }

    /// The numbers of ranks.
    pub(crate) fn worlds(&self) -> Vec<usize> {
        self.worlds.clone().unwrap_or(if self.targets { vec![2, 4] } else { vec![2] })
    }

    /// Which models to train.
    pub(crate) fn models(&self) -> Vec<&'static str> {
        self.models.clone().unwrap_or(if self.targets { MODELS.to_vec() } else { Vec::new() })
    }

    /// What to measure with so many ranks.
    pub(crate) fn cases(&self, world: usize) -> Vec<Case> {
        if self.targets {
            let mut cases = targets::cases(world);
            cases.retain(|case| {
                self.collectives.contains(&case.collective)
                    && self.sizes.as_ref().is_none_or(|s| s.contains(&case.bytes))
                    && self.kinds.as_ref().is_none_or(|k| k.contains(&case.kind))
            });
            return cases;
        }
        let sizes = self.sizes.clone().unwrap_or_else(|| SIZES.to_vec());
        let kinds = self.kinds.clone().unwrap_or_else(|| vec![Kind::Float]);
        let mut cases = Vec::new();
        for &collective in &self.collectives {
            for &kind in &kinds {
                for &bytes in &sizes {
                    let bytes = bytes.max(kind.elt_size_in_bytes());
                    if collective != Collective::Barrier {
                        cases.push(Case { collective, bytes, kind });
                    }
                }
                if collective == Collective::Barrier {
                    cases.push(Case { collective, bytes: 0, kind });
                    break;
                }
            }
        }
        cases
    }
}

fn list<T>(text: &str, item: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(|word| item(word.trim())).collect()
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn size(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    Ok(number(digits)? << shift)
}

fn kind(text: &str) -> Result<Kind, String> {
    KINDS.iter().find(|(name, _)| *name == text).map(|k| k.1).ok_or_else(|| format!("{text:?} is no kind"))
}

fn engine(text: &str) -> Result<Engine, String> {
    ENGINES.into_iter().find(|e| e.to_string() == text).ok_or_else(|| format!("{text:?} is no engine"))
}

fn model(text: &str) -> Result<&'static str, String> {
    MODELS.into_iter().find(|m| *m == text).ok_or_else(|| format!("{text:?} is no model"))
}

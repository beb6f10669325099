//! The handwritten digits that come with the examples (see `examples/data/README.md`).

use std::error::Error;
use std::io::Read;

use tch::Tensor;

/// Pictures and what they show.
#[derive(Debug)]
pub struct Digits {
    /// `[n, 1, 8, 8]`, f32, 0 to 1.
    pub images: Tensor,
    /// `[n]`, i64, 0 to 9.
    pub labels: Tensor,
}

/// All 1 797 digits, in the file's order.
pub fn load() -> Result<Digits, Box<dyn Error>> {
    let packed = include_bytes!("../data/digits.csv.gz");
    let mut text = String::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut text)?;
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|l| !l.is_empty()) {
        let values = line
            .split(',')
            .map(|v| Ok(v.trim().parse::<f32>()?))
            .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        let [image @ .., label] = &values[..] else { return Err("a digit is a line of numbers".into()) };
        pixels.extend(image.iter().map(|v| v / 16.0));
        labels.push(*label as i64);
    }
    let n = labels.len() as i64;
    Ok(Digits {
        images: Tensor::from_slice(&pixels).f_view([n, 1, 8, 8])?,
        labels: Tensor::from_slice(&labels),
    })
}

#[allow(dead_code, reason = "each example includes this file and uses what it needs")]
impl Digits {
    /// How many there are.
    pub fn len(&self) -> i64 {
        self.labels.size()[0]
    }

    /// `len` digits from `start` on; shares memory with these.
    pub fn narrow(&self, start: i64, len: i64) -> Self {
        Self { images: self.images.narrow(0, start, len), labels: self.labels.narrow(0, start, len) }
    }

    /// These digits, in this order.
    pub fn select(&self, indices: &[i64]) -> Self {
        let indices = Tensor::from_slice(indices);
        Self { images: self.images.index_select(0, &indices), labels: self.labels.index_select(0, &indices) }
    }

    /// Those to train on, and the fifth that is held out: every fifth digit.
    pub fn split(&self) -> (Self, Self) {
        let (held_out, train): (Vec<i64>, Vec<i64>) = (0..self.len()).partition(|i| i % 5 == 4);
        (self.select(&train), self.select(&held_out))
    }
}

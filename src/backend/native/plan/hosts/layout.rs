//! Which ranks are on which host, and who carries what between hosts.

/// Which ranks are on which host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The ranks of each host, ascending; hosts in the order of their first ranks.
    pub(crate) hosts: Vec<Vec<usize>>,
    /// Of each rank: its host, and its number there.
    place: Vec<(usize, usize)>,
}

impl Layout {
    /// From what each rank says is its host.
    pub(crate) fn new<T: PartialEq>(names: &[T]) -> Self {
        let mut hosts: Vec<Vec<usize>> = Vec::new();
        let mut place = Vec::with_capacity(names.len());
        for (rank, name) in names.iter().enumerate() {
            let host = hosts.iter().position(|h| names[h[0]] == *name).unwrap_or_else(|| {
                hosts.push(Vec::new());
                hosts.len() - 1
            });
            place.push((host, hosts[host].len()));
            hosts[host].push(rank);
        }
        Self { hosts, place }
    }

    pub(crate) fn world(&self) -> usize {
        self.place.len()
    }

    /// A rank's host and its number there.
    pub(crate) fn place(&self, rank: usize) -> (usize, usize) {
        self.place[rank]
    }

    /// The ranks of a rank's host.
    pub(crate) fn neighbours(&self, rank: usize) -> &[usize] {
        &self.hosts[self.place[rank].0]
    }

    /// Whether there is anything to do in two stages: several hosts, of which one has several ranks.
    pub(crate) fn is_deep(&self) -> bool {
        self.hosts.len() > 1 && self.hosts.iter().any(|h| h.len() > 1)
    }

    pub(super) fn pieces(&self) -> usize {
        self.hosts.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// The rank of a host that carries piece `p`.
    pub(super) fn carrier(&self, host: usize, p: usize) -> usize {
        self.hosts[host][p % self.hosts[host].len()]
    }

    /// The ranks whose data a rank carries between hosts: itself, and on each other host those with its
    /// number there.
    pub(super) fn carries(&self, rank: usize) -> Vec<usize> {
        let (host, number) = self.place[rank];
        let size = self.hosts[host].len();
        let carried = |&r: &usize| r == rank || self.place[r].0 != host && self.place[r].1 % size == number;
        (0..self.place.len()).filter(carried).collect()
    }
}

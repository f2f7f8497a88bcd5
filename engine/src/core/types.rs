//! What goes into the state machine and what comes out of it: plain data.

use std::fmt;
use std::time::Duration;

use crate::limits;

/// A set of replicas, by their number within the configuration.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Set(u32);

impl Set {
    pub const EMPTY: Set = Set(0);

    /// The replicas `0..count`.
    pub fn first(count: usize) -> Set {
        assert!(count <= limits::MAX_REPLICAS, "at most {} replicas, not {count}", limits::MAX_REPLICAS);
        Set((1 << count) - 1)
    }

    pub fn only(replica: usize) -> Set {
        assert!(replica < limits::MAX_REPLICAS, "replica number {replica} is out of range");
        Set(1 << replica)
    }

    pub fn contains(self, replica: usize) -> bool {
        replica < 32 && self.0 >> replica & 1 == 1
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub fn with(self, other: Set) -> Set {
        Set(self.0 | other.0)
    }

    pub fn without(self, other: Set) -> Set {
        Set(self.0 & !other.0)
    }

    pub fn and(self, other: Set) -> Set {
        Set(self.0 & other.0)
    }

    pub fn lowest(self) -> Option<usize> {
        (self.0 != 0).then(|| self.0.trailing_zeros() as usize)
    }

    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..32).filter(move |replica| self.contains(*replica))
    }
}

impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A buffer that the surroundings own; the core only passes its number on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BufferId(pub u32);

/// Where in a buffer a request's bytes begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    pub buffer: BufferId,
    pub start: usize,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    /// The range reads as zeroes afterwards; `allocate`: without giving its space back.
    Zero {
        allocate: bool,
    },
}

/// Why a request failed, as far as callers can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Io,
    NoSpace,
    Invalid,
}

/// A client's request. The buffer stays the core's until [`Output::Complete`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submission {
    pub tag: u64,
    pub operation: Operation,
    pub offset: u64,
    pub length: u64,
    pub payload: Option<Payload>,
}

/// What a replica answers to a control request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlReply {
    Done,
    Refused(String),
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A client wants something.
    Submit(Submission),
    /// A replica answered a [`Transfer`]; the bytes of a read are in their buffer.
    Reply { replica: usize, cookie: u64, failure: Option<Failure> },
    /// A replica's data connection ended, or it broke the protocol.
    ConnectionLost { replica: usize, reason: String },
    /// A replica answered its oldest unanswered control request.
    ControlReply { replica: usize, reply: ControlReply },
    /// A control request could not be sent or its answer did not come.
    ControlLost { replica: usize, reason: String },
    /// The answer to [`Output::Compare`].
    Compared { token: u64, differing: Set },
    /// Begin a barrier: [`Output::Paused`] follows.
    Pause,
    /// End it.
    Resume,
    /// Finish: [`Output::Ended`] follows. The caller makes sure that nobody uses the volume any more.
    Shutdown,
    /// Time passed.
    Tick,
}

/// A request to one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub replica: usize,
    pub cookie: u64,
    pub operation: Operation,
    pub offset: u64,
    pub length: u32,
    /// The bytes of a write. Those of a read go where [`super::Core::expected`] says.
    pub payload: Option<Payload>,
}

/// A control request to one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlRequest {
    Fence { generation: u64, members: Set },
    Close { generation: u64 },
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Send(Transfer),
    Control {
        replica: usize,
        request: ControlRequest,
    },
    /// Forget everything that is queued for this replica and close its connections, before anything that follows.
    Drop {
        replica: usize,
        reason: String,
    },
    /// All members have recorded this generation. Remember it for a next life of this engine, before anything that follows.
    Record {
        generation: u64,
        members: Set,
    },
    /// Replicas may differ in a way that repeating unanswered requests does not heal. Remember it, before anything that follows.
    MayDiffer,
    /// They do not any more.
    Equal,
    /// Compare the first `length` bytes of these buffers with `pinned` and answer by [`Event::Compared`].
    Compare {
        token: u64,
        length: usize,
        pinned: BufferId,
        others: Vec<(usize, BufferId)>,
    },
    Complete {
        tag: u64,
        result: Result<(), Failure>,
    },
    /// The barrier holds: nothing is in flight; `flushed` tells whether everything acknowledged is on stable storage.
    Paused {
        flushed: bool,
    },
    /// Nothing is in flight and nothing will be taken any more; `clean`: every member recorded that it ended cleanly.
    Ended {
        clean: bool,
    },
    StatusChanged,
}

/// How a core begins. Its members have recorded `generation` and their connections are open.
#[derive(Clone, Debug)]
pub struct Options {
    pub size_bytes: u64,
    pub generation: u64,
    /// How many replicas the configuration names.
    pub replicas: usize,
    pub members: Set,
    /// The replica to read from when it is in sync.
    pub read_from: Option<usize>,
    /// Members may differ in writes that were in flight.
    pub compare: bool,
    pub replica_timeout: Duration,
    pub no_replica_hold: Duration,
    /// One buffer for each replica, for comparing; at least `compare_step_bytes` long.
    pub scratch: Vec<BufferId>,
    pub compare_step_bytes: u64,
    pub zero_piece_bytes: u64,
}

/// How one replica does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    InSync,
    Comparing,
    Dropped,
}

/// Operations since the core began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub read_ops: u64,
    pub read_bytes: u64,
    pub write_ops: u64,
    pub write_bytes: u64,
    pub flush_ops: u64,
    /// Requests that had to wait for the range lock or a barrier.
    pub waited_ops: u64,
    pub compared_bytes: u64,
    pub repaired_bytes: u64,
}

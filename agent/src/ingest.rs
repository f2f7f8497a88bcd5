//! One pass from incoming bytes to a file on disk: SHA-512, BLAKE3 of every chunk, zero detection and writing, in parallel.
//!
//! Bytes are cut into chunks of 1 MiB. One thread hashes them with SHA-512 (the slowest part), another one hashes them with
//! BLAKE3 and writes what is not zero. Queues are bounded; nothing is read again, apart from the tables of a qcow2 file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api::ids::Sha512Digest;
use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::config_file::Format;
use crate::error::{AgentError, blocking};
use crate::limits::{CHUNK_BYTES, INGEST_QUEUE, MAX_FILE_BYTES, WRITE_BACK_BYTES};
use crate::manifest::{ChunkHash, hash_chunk};
use crate::sha512::Sha512;
use crate::{durable, metrics, qcow2, sparse};

const SECTOR_BYTES: u64 = 512;

/// A file that is being written. Dropped unfinished, it leaves the partial file to its owner.
pub struct Ingest {
    path: PathBuf,
    buffer: BytesMut,
    received_bytes: u64,
    format: Option<Format>,
    to_hasher: mpsc::Sender<Hash>,
    to_writer: mpsc::Sender<Write>,
    hasher: JoinHandle<Digests>,
    /// `None` after it ended early with an error.
    writer: Option<JoinHandle<Result<Written, AgentError>>>,
    /// Bytes that the writer has written; see [`Ingest::written`].
    written: Arc<AtomicU64>,
}

/// A whole file, synced, under its partial name.
#[derive(Debug)]
pub struct Ingested {
    pub file: File,
    pub size_bytes: u64,
    pub virtual_size_bytes: u64,
    pub format: Format,
    /// Of the file as stored.
    pub sha512: Sha512Digest,
    /// Of what was received, when padding was added.
    pub unpadded_sha512: Option<Sha512Digest>,
    pub chunks: Vec<ChunkHash>,
}

enum Hash {
    Data(Bytes),
    /// What follows is padding.
    Mark,
}

enum Write {
    Data(Bytes),
    /// It is in the file already.
    Present(Bytes),
}

struct Digests {
    stored: Sha512Digest,
    unpadded: Option<Sha512Digest>,
}

struct Written {
    file: File,
    chunks: Vec<ChunkHash>,
}

impl Ingest {
    /// Creates the partial file, emptied if it existed, and takes room for all of it when the length is known.
    pub async fn begin(path: &Path, length: Option<u64>) -> Result<Ingest, AgentError> {
        if let Some(size_bytes) = length {
            check_size(size_bytes)?;
        }
        let own = path.to_path_buf();
        let file = blocking(move || create(&own, length)).await?;
        Ok(Ingest::start(path, file, length.is_some()))
    }

    /// Goes on with a partial file of which the first bytes, a whole number of chunks, are known to be on the disk. They are
    /// hashed again; what lies behind them is forgotten.
    pub async fn resume(path: &Path, length: Option<u64>, bytes: u64) -> Result<Ingest, AgentError> {
        assert!(bytes.is_multiple_of(CHUNK_BYTES), "a checkpoint lies between two chunks");
        let own = path.to_path_buf();
        let (file, source) = blocking(move || {
            let file = open_again(&own, length, bytes)?;
            let source = file.try_clone().map_err(AgentError::io("open", &own))?;
            Ok((file, Arc::new(source)))
        })
        .await?;
        let mut ingest = Ingest::start(path, file, length.is_some());
        while ingest.received_bytes < bytes {
            let (own, source, offset) = (ingest.path.clone(), source.clone(), ingest.received_bytes);
            let chunk = blocking(move || {
                let mut chunk = vec![0; CHUNK_BYTES as usize];
                source.read_exact_at(&mut chunk, offset).map_err(AgentError::io("read", &own))?;
                Ok(Bytes::from(chunk))
            })
            .await?;
            if ingest.format.is_none() {
                ingest.buffer.extend_from_slice(&chunk[..qcow2::HEADER_BYTES]);
                ingest.probe()?;
                ingest.buffer.clear();
            }
            ingest.received_bytes += CHUNK_BYTES;
            ingest.send_hash(Hash::Data(chunk.clone())).await?;
            ingest.send_write(Write::Present(chunk)).await?;
        }
        Ok(ingest)
    }

    fn start(path: &Path, file: File, reserved: bool) -> Ingest {
        let (to_hasher, hashes) = mpsc::channel(INGEST_QUEUE);
        let (to_writer, writes) = mpsc::channel(INGEST_QUEUE);
        let own = path.to_path_buf();
        let written = Arc::new(AtomicU64::new(0));
        let count = written.clone();
        Ingest {
            path: path.to_path_buf(),
            buffer: BytesMut::with_capacity(CHUNK_BYTES as usize),
            received_bytes: 0,
            format: None,
            to_hasher,
            to_writer,
            hasher: tokio::task::spawn_blocking(move || hash_all(hashes)),
            writer: Some(tokio::task::spawn_blocking(move || write_all(file, &own, reserved, &count, writes))),
            written,
        }
    }

    /// How many bytes are in the file by now, while the work goes on. Whether they are on the disk is another matter.
    pub fn written(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    /// Bytes received so far: where a broken transfer goes on.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// Takes more bytes; waits while the disk or the hasher are behind.
    pub async fn push(&mut self, mut bytes: Bytes) -> Result<(), AgentError> {
        self.received_bytes += bytes.len() as u64;
        metrics::RECEIVED_BYTES.add(bytes.len() as u64);
        check_size(self.received_bytes)?;
        while !bytes.is_empty() {
            let room = CHUNK_BYTES as usize - self.buffer.len();
            let part = bytes.split_to(room.min(bytes.len()));
            self.buffer.extend_from_slice(&part);
            if self.buffer.len() as u64 == CHUNK_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Ends the file: pads it if asked, judges format and size, syncs the data.
    pub async fn finish(mut self, pad_to_sector: bool) -> Result<Ingested, AgentError> {
        if self.received_bytes == 0 {
            self.stop().await;
            return Err(AgentError::Empty);
        }
        let mut size_bytes = self.received_bytes;
        self.probe()?;
        let format = self.format.expect("the format is probed when there are bytes");
        let excess = size_bytes % SECTOR_BYTES;
        if format == Format::Raw && excess != 0 {
            if !pad_to_sector {
                self.stop().await;
                return Err(AgentError::NotWholeSectors { size_bytes });
            }
            let padding = (SECTOR_BYTES - excess) as usize;
            // A chunk is a whole number of sectors, so the padding always fits into the one that is begun.
            let data = self.buffer.split().freeze();
            self.send_hash(Hash::Data(data.clone())).await?;
            self.send_hash(Hash::Mark).await?;
            self.send_hash(Hash::Data(Bytes::from(vec![0; padding]))).await?;
            let mut chunk = BytesMut::from(&data[..]);
            chunk.resize(data.len() + padding, 0);
            self.send_write(Write::Data(chunk.freeze())).await?;
            size_bytes += padding as u64;
        } else if !self.buffer.is_empty() {
            self.flush().await?;
        }
        let Ingest { path, to_hasher, to_writer, hasher, writer, .. } = self;
        drop((to_hasher, to_writer));
        let written = join(writer.ok_or(AgentError::Cancelled)?).await??;
        let digests = join(hasher).await?;
        blocking(move || {
            let Written { file, chunks } = written;
            file.set_len(size_bytes).map_err(AgentError::io("set the length of", &path))?;
            file.sync_all().map_err(AgentError::io("sync", &path))?;
            let virtual_size_bytes = match format {
                Format::Raw => size_bytes,
                Format::Qcow2 => qcow2::inspect(&file, size_bytes).map_err(AgentError::Qcow2)?.virtual_size_bytes,
            };
            Ok(Ingested {
                file,
                size_bytes,
                virtual_size_bytes,
                format,
                sha512: digests.stored,
                unpadded_sha512: digests.unpadded,
                chunks,
            })
        })
        .await
    }

    /// Ends the work; nothing is written any more afterwards.
    pub async fn stop(self) {
        let Ingest { to_hasher, to_writer, hasher, writer, .. } = self;
        drop((to_hasher, to_writer));
        let _ = hasher.await;
        if let Some(writer) = writer {
            let _ = writer.await;
        }
    }

    /// Decides on the format by the first bytes, once; a bad qcow2 header ends the transfer before the rest is fetched.
    fn probe(&mut self) -> Result<(), AgentError> {
        if self.format.is_none() {
            let format = if self.buffer.starts_with(&qcow2::MAGIC) { Format::Qcow2 } else { Format::Raw };
            self.format = Some(format);
            if format == Format::Qcow2 {
                let header = &self.buffer[..self.buffer.len().min(qcow2::HEADER_BYTES)];
                qcow2::Header::parse(header).map_err(AgentError::Qcow2)?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), AgentError> {
        self.probe()?;
        let chunk = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(CHUNK_BYTES as usize)).freeze();
        self.send_hash(Hash::Data(chunk.clone())).await?;
        self.send_write(Write::Data(chunk)).await
    }

    async fn send_hash(&mut self, hash: Hash) -> Result<(), AgentError> {
        self.to_hasher.send(hash).await.map_err(|_| AgentError::Cancelled)
    }

    async fn send_write(&mut self, write: Write) -> Result<(), AgentError> {
        if self.to_writer.send(write).await.is_ok() {
            return Ok(());
        }
        // The writer ended early: its error says why.
        match self.writer.take() {
            Some(writer) => join(writer).await?.and(Err(AgentError::Cancelled)),
            None => Err(AgentError::Cancelled),
        }
    }
}

fn check_size(size_bytes: u64) -> Result<(), AgentError> {
    if size_bytes > MAX_FILE_BYTES {
        return Err(AgentError::TooLarge { size_bytes, limit_bytes: MAX_FILE_BYTES });
    }
    Ok(())
}

fn create(path: &Path, length: Option<u64>) -> Result<File, AgentError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    durable::create_dir(parent)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(AgentError::io("create", path))?;
    take_room(&file, path, 0, length)?;
    Ok(file)
}

/// Opens a partial file of which the first bytes are right; what was written behind them is dropped.
fn open_again(path: &Path, length: Option<u64>, bytes: u64) -> Result<File, AgentError> {
    let file = File::options().read(true).write(true).open(path).map_err(AgentError::io("open", path))?;
    file.set_len(bytes).map_err(AgentError::io("set the length of", path))?;
    take_room(&file, path, bytes, length)?;
    Ok(file)
}

/// Takes room for what is still to come.
fn take_room(file: &File, path: &Path, start: u64, length: Option<u64>) -> Result<(), AgentError> {
    let Some(length) = length.filter(|length| *length > start) else { return Ok(()) };
    // The length comes first: behind the end of a file ext4 makes no holes, so reserved zeros would keep their blocks.
    sparse::check_free(path.parent().unwrap_or(Path::new("/")), length - start)?;
    file.set_len(length).map_err(AgentError::io("set the length of", path))?;
    sparse::reserve(file, path, start, length - start)?;
    Ok(())
}

fn hash_all(mut hashes: mpsc::Receiver<Hash>) -> Digests {
    let mut context = Sha512::new();
    let mut unpadded = None;
    while let Some(hash) = hashes.blocking_recv() {
        match hash {
            Hash::Data(bytes) => context.update(&bytes),
            Hash::Mark => unpadded = Some(context.clone().finish()),
        }
    }
    Digests { stored: context.finish(), unpadded }
}

fn write_all(
    file: File,
    path: &Path,
    reserved: bool,
    written: &AtomicU64,
    mut writes: mpsc::Receiver<Write>,
) -> Result<Written, AgentError> {
    let mut chunks = vec![];
    let mut written_back = 0;
    while let Some(write) = writes.blocking_recv() {
        let offset = chunks.len() as u64 * CHUNK_BYTES;
        let chunk = match &write {
            Write::Data(chunk) => {
                sparse::write_at(&file, offset, chunk, reserved).map_err(AgentError::io("write", path))?;
                metrics::WRITTEN_BYTES.add(chunk.len() as u64);
                chunk
            }
            Write::Present(chunk) => chunk,
        };
        chunks.push(hash_chunk(chunk));
        let end = offset + chunk.len() as u64;
        written.store(end, Ordering::Release);
        if end - written_back >= WRITE_BACK_BYTES {
            sparse::write_back(&file, written_back..end);
            written_back = end;
        }
    }
    Ok(Written { file, chunks })
}

async fn join<T>(task: impl Future<Output = Result<T, tokio::task::JoinError>>) -> Result<T, AgentError> {
    match task.await {
        Ok(value) => Ok(value),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(AgentError::Cancelled),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    async fn ingest(dir: &Path, bytes: &[u8], piece: usize, pad: bool) -> Result<Ingested, AgentError> {
        let mut ingest = Ingest::begin(&dir.join("f.tmp"), Some(bytes.len() as u64)).await?;
        for part in bytes.chunks(piece) {
            ingest.push(Bytes::copy_from_slice(part)).await?;
        }
        ingest.finish(pad).await
    }

    fn sha512(bytes: &[u8]) -> String {
        let mut digest = Sha512::new();
        digest.update(bytes);
        digest.finish().to_string()
    }

    #[tokio::test]
    async fn the_file_its_hashes_and_its_holes_are_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = vec![0u8; 5 << 20];
        bytes[10] = 1;
        bytes[(3 << 20) + 77..(3 << 20) + 99].fill(9);
        bytes.extend_from_slice(&[5; 1024]);
        for piece in [1000, 1 << 20, 3_333_333] {
            let result = ingest(dir.path(), &bytes, piece, false).await.unwrap();
            assert!(std::fs::read(dir.path().join("f.tmp")).unwrap() == bytes);
            assert_eq!(result.sha512.as_str(), sha512(&bytes));
            assert_eq!(result.format, Format::Raw);
            let holes: Vec<bool> = result.chunks.iter().map(Option::is_none).collect();
            assert_eq!(holes, [false, true, true, false, true, false]);
            let used = result.file.metadata().unwrap().blocks() * 512;
            assert!(used <= 4 * 64 * 1024, "sparse, but {used} bytes used");
        }
    }

    #[tokio::test]
    async fn room_is_taken_before_the_first_byte_and_zeros_at_the_end_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.tmp");
        let begun = Ingest::begin(&path, Some(3 << 20)).await.unwrap();
        assert!(path.metadata().unwrap().blocks() * 512 >= 3 << 20);
        begun.stop().await;
        // Without a length nothing is taken, and zeros are not written.
        let mut bytes = vec![0u8; 3 << 20];
        bytes[0] = 1;
        let mut ingest = Ingest::begin(&path, None).await.unwrap();
        ingest.push(Bytes::from(bytes.clone())).await.unwrap();
        ingest.finish(false).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }

    #[tokio::test]
    async fn a_file_that_says_no_length_is_not_received_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let mut ingest = Ingest::begin(&dir.path().join("f.tmp"), None).await.unwrap();
        ingest.received_bytes = MAX_FILE_BYTES;
        assert!(matches!(ingest.push(Bytes::from_static(b"x")).await, Err(AgentError::TooLarge { .. })));
    }

    #[tokio::test]
    async fn a_raw_size_that_is_no_multiple_of_512_is_refused_or_padded() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = vec![3u8; 1_000_000];
        let error = ingest(dir.path(), &bytes, 4096, false).await.unwrap_err();
        assert!(
            error.to_string().contains("this one has 1000000") && error.to_string().contains("append 448"),
            "{error}"
        );
        let result = ingest(dir.path(), &bytes, 4096, true).await.unwrap();
        let mut padded = bytes.clone();
        padded.resize(1_000_448, 0);
        assert_eq!(result.size_bytes, 1_000_448);
        assert_eq!(result.sha512.as_str(), sha512(&padded));
        assert_eq!(result.unpadded_sha512.unwrap().as_str(), sha512(&bytes));
        assert_eq!(result.chunks, [hash_chunk(&padded)]);
    }

    #[tokio::test]
    async fn an_empty_source_and_a_bad_qcow2_header_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(ingest(dir.path(), &[], 1, true).await, Err(AgentError::Empty)));
        let error = ingest(dir.path(), b"QFI\xfb and nothing more", 5, false).await.unwrap_err();
        assert!(error.chain().contains("header is cut"), "{}", error.chain());
    }
}

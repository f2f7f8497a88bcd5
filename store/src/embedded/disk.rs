//! The redb file: what was committed, read once at the start.
//!
//! Table `objects` holds one row per object, keyed `group/plural/namespace/name` (no part can hold a slash); table `meta` holds the
//! version of the last commit and the format of the file. Both change in one transaction, so a version on disk is always that of the rows.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::state::{Change, ObjectId, State};
use crate::{Object, StoreError};

const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT_KEY: &str = "format";
const VERSION_KEY: &str = "version";
/// Raised when an older program could not read the file any more.
const FORMAT: u64 = 1;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The open file, or nothing for a store in memory.
pub struct Disk(Option<Open>);

struct Open {
    path: PathBuf,
    /// `None` after a failed write: redb refuses to go on until the file is opened again.
    database: Option<Database>,
}

impl Disk {
    /// No file: every commit succeeds.
    pub fn none() -> Disk {
        Disk(None)
    }

    pub fn open(path: &Path) -> Result<Disk, StoreError> {
        let database = open(path)?;
        Ok(Disk(Some(Open { path: path.to_owned(), database: Some(database) })))
    }

    /// All that was committed.
    pub fn load(&self) -> Result<State, StoreError> {
        match &self.0 {
            None => Ok(State::default()),
            Some(Open { path, database: Some(database) }) => load(path, database),
            Some(Open { path, database: None }) => {
                Err(StoreError::Open { path: path.clone(), source: "it is closed after a failed write".into() })
            }
        }
    }

    /// Whether a failed write has closed the file.
    pub fn is_closed(&self) -> bool {
        self.0.as_ref().is_some_and(|open| open.database.is_none())
    }

    /// Opens the file again after a failed write.
    pub fn reopen(&mut self) -> Result<(), StoreError> {
        if let Some(file) = self.0.as_mut().filter(|file| file.database.is_none()) {
            file.database = Some(open(&file.path)?);
        }
        Ok(())
    }

    /// Makes changes durable, all or none. After a failure the file is closed, and which of the two happened is unknown.
    pub fn commit(&mut self, version: u64, changes: &[Change]) -> Result<(), StoreError> {
        let Some(file) = &mut self.0 else { return Ok(()) };
        let write_error = |source: BoxError| StoreError::Write { path: file.path.clone(), source };
        let Some(database) = &file.database else {
            return Err(write_error("it is closed after a failed write".into()));
        };
        commit(database, version, changes).map_err(|source| {
            let error = write_error(source);
            file.database = None;
            error
        })
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let error = |source: BoxError| StoreError::Open { path: path.to_owned(), source };
    // Objects may carry secrets, so nobody else may read the file.
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    drop(file.map_err(|e| error(e.into()))?);
    let database = Database::create(path).map_err(|e| match e {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        other => error(other.into()),
    })?;
    prepare(&database).map_err(error)?;
    // A new file is there after a loss of power only when its directory is synced too.
    runtime::files::sync_parent(path).map_err(|e| error(e.into()))?;
    Ok(database)
}

/// Makes the tables of a new file, and refuses one that a newer program wrote.
fn prepare(database: &Database) -> Result<(), BoxError> {
    let transaction = database.begin_write()?;
    transaction.open_table(OBJECTS)?;
    let format = transaction.open_table(META)?.get(FORMAT_KEY)?.map(|row| row.value());
    match format {
        Some(FORMAT) => return Ok(transaction.abort()?),
        Some(other) => {
            return Err(
                format!("its format is {other}, and this program reads only {FORMAT}: use a newer program").into()
            );
        }
        None => {
            transaction.open_table(META)?.insert(FORMAT_KEY, FORMAT)?;
        }
    }
    Ok(transaction.commit()?)
}

fn load(path: &Path, database: &Database) -> Result<State, StoreError> {
    let error = |source: BoxError| StoreError::Open { path: path.to_owned(), source };
    let (version, rows) = read(database).map_err(error)?;
    let mut objects = Vec::with_capacity(rows.len());
    for (key, value) in rows {
        let id =
            ObjectId::from_row(&key).ok_or_else(|| error(format!("row `{key}` is not the key of an object").into()))?;
        let map = serde_json::from_slice(&value).map_err(|source| StoreError::Corrupt {
            resource: id.plural.clone(),
            name: id.name.clone(),
            source,
        })?;
        objects.push((id, Arc::new(Object(map))));
    }
    Ok(State::restore(version, objects))
}

type Rows = Vec<(String, Vec<u8>)>;

fn read(database: &Database) -> Result<(u64, Rows), BoxError> {
    let transaction = database.begin_read()?;
    let version = transaction.open_table(META)?.get(VERSION_KEY)?.map_or(0, |row| row.value());
    let mut rows = vec![];
    for row in transaction.open_table(OBJECTS)?.iter()? {
        let (key, value) = row?;
        rows.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok((version, rows))
}

fn commit(database: &Database, version: u64, changes: &[Change]) -> Result<(), BoxError> {
    // A transaction of redb is durable when its commit returns; that is the default and must stay so.
    let transaction = database.begin_write()?;
    {
        let mut objects = transaction.open_table(OBJECTS)?;
        for change in changes {
            let row = change.id.to_row();
            if change.removed {
                objects.remove(row.as_str())?;
            } else {
                objects.insert(row.as_str(), serde_json::to_vec(&change.object.0)?.as_slice())?;
            }
        }
        transaction.open_table(META)?.insert(VERSION_KEY, version)?;
    }
    Ok(transaction.commit()?)
}

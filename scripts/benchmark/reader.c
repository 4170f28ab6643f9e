/* Reads files and says how long it took; what `scripts/bench` measures small files, large files and random reads with.
 *
 *   reader files PROCESSES   open, read whole, close: each file named on standard input (names end in NUL)
 *   reader random            open all, then read 4096 bytes at each place: NAME NUL OFFSET NUL, again and again
 *
 * Names are relative to the working directory. First line of output: nanoseconds, bytes, a checksum that depends on where
 * the bytes were. `random` adds a line for each read: its nanoseconds. With several processes each takes a share of
 * consecutive names.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 128 << 10, PAGE = 4096 };

static char *words[1 << 20];
static size_t count;

static void fail(const char *what)
{
	fprintf(stderr, "reader: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static uint64_t now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void read_words(void)
{
	size_t size = 0, room = 1 << 20;
	char *data = malloc(room);
	ssize_t got;
	while (data && (got = read(0, data + size, room - size)) != 0) {
		if (got < 0)
			fail("standard input");
		size += (size_t)got;
		if (size == room)
			data = realloc(data, room *= 2);
	}
	if (!data)
		fail("memory");
	for (size_t at = 0; at < size && count < sizeof words / sizeof *words; at += strlen(data + at) + 1)
		words[count++] = data + at;
}

struct sum {
	uint64_t bytes, check;
};

/* Only the ends of each piece: enough to tell wrong data from right, and no work to speak of. */
static void add(struct sum *sum, const char *piece, size_t size)
{
	uint64_t head = 0, tail = 0;
	size_t part = size < 8 ? size : 8;
	memcpy(&head, piece, part);
	memcpy(&tail, piece + size - part, part);
	sum->bytes += size;
	sum->check = (sum->check ^ head) * 1099511628211u ^ tail;
}

static void read_files(char **names, size_t number, struct sum *sum)
{
	char *piece = malloc(PIECE);
	if (!piece)
		fail("memory");
	for (size_t i = 0; i < number; i++) {
		int fd = open(names[i], O_RDONLY);
		ssize_t got;
		if (fd < 0)
			fail(names[i]);
		while ((got = read(fd, piece, PIECE)) > 0)
			add(sum, piece, (size_t)got);
		if (got < 0)
			fail(names[i]);
		close(fd);
	}
}

static int files(size_t processes)
{
	struct sum *sums = mmap(NULL, processes * sizeof *sums, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct sum all = {0, 0};
	int status = 0, one;
	uint64_t began = now();
	if (sums == MAP_FAILED)
		fail("memory");
	if (processes == 1) {
		read_files(words, count, sums);
	} else {
		for (size_t i = 0; i < processes; i++) {
			size_t first = count * i / processes, last = count * (i + 1) / processes;
			pid_t child = fork();
			if (child < 0)
				fail("fork");
			if (child == 0) {
				read_files(words + first, last - first, sums + i);
				_exit(0);
			}
		}
		while (wait(&one) > 0)
			status |= one;
	}
	uint64_t ended = now();
	for (size_t i = 0; i < processes; i++) {
		all.bytes += sums[i].bytes;
		all.check ^= sums[i].check;
	}
	printf("%llu %llu %llu\n", (unsigned long long)(ended - began), (unsigned long long)all.bytes, (unsigned long long)all.check);
	return status != 0;
}

static int random_reads(void)
{
	size_t number = count / 2;
	uint64_t *times = calloc(number + 1, sizeof *times);
	int *fds = calloc(number + 1, sizeof *fds);
	struct sum sum = {0, 0};
	char page[PAGE];
	if (!times || !fds)
		fail("memory");
	for (size_t i = 0; i < number; i++) {
		/* The same file is opened once: a descriptor for each read would be too many. */
		size_t same = 0;
		while (same < i && strcmp(words[2 * same], words[2 * i]) != 0)
			same++;
		fds[i] = same < i ? fds[same] : open(words[2 * i], O_RDONLY);
		if (fds[i] < 0)
			fail(words[2 * i]);
	}
	uint64_t began = now(), before = began;
	for (size_t i = 0; i < number; i++) {
		ssize_t got = pread(fds[i], page, PAGE, strtoll(words[2 * i + 1], NULL, 10));
		if (got < 0)
			fail(words[2 * i]);
		uint64_t after = now();
		times[i] = after - before;
		if (got > 0)
			add(&sum, page, (size_t)got);
		before = after;
	}
	printf("%llu %llu %llu\n", (unsigned long long)(before - began), (unsigned long long)sum.bytes, (unsigned long long)sum.check);
	for (size_t i = 0; i < number; i++)
		printf("%llu\n", (unsigned long long)times[i]);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "files") && atoi(argv[2]) > 0) {
		read_words();
		return files((size_t)atoi(argv[2]));
	}
	if (argc == 2 && !strcmp(argv[1], "random")) {
		read_words();
		return random_reads();
	}
	fprintf(stderr, "usage: reader files PROCESSES | reader random\n");
	return 2;
}

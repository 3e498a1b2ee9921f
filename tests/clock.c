/* A wall clock that a test sets: seconds in the file $TEST_CLOCK, a 64-bit number, are added to what the kernel says.
 *
 * Loaded by LD_PRELOAD. Clocks that nobody can set (CLOCK_MONOTONIC) are left alone. Waits until a moment of the wall clock end when
 * that clock says so, if they began after it was set. (libfaketime 0.9.10 makes every sleep of Python 3.11 fail instead, which is until a
 * moment of CLOCK_MONOTONIC.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t nothing = 0;
static volatile const int64_t *ahead = &nothing;

__attribute__((constructor)) static void open_clock(void) {
    const char *path = getenv("TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *shared = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED)
        ahead = shared;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Nothing has been up for thirty years, so a later moment is one of the wall clock. */
static const struct timespec *true_moment(const struct timespec *moment, struct timespec *made) {
    if (!moment || moment->tv_sec < 1000000000)
        return moment;
    *made = *moment;
    made->tv_sec -= *ahead;
    return made;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real)
        real = REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *ahead;
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    (void)zone;
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *kept) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (kept)
        *kept = found.tv_sec;
    return found.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    static __typeof__(&pthread_cond_timedwait) real;
    struct timespec made;
    if (!real)
        real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2") ?: REAL(pthread_cond_timedwait);
    return real(condition, mutex, true_moment(until, &made));
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static __typeof__(&sem_timedwait) real;
    struct timespec made;
    if (!real)
        real = REAL(sem_timedwait);
    return real(semaphore, true_moment(until, &made));
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    long a[6];
    struct timespec made;
    va_list list;
    va_start(list, number);
    for (int n = 0; n < 6; n++)
        a[n] = va_arg(list, long);
    va_end(list);
    if (!real)
        real = REAL(syscall);
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME))
        a[3] = (long)true_moment((const struct timespec *)a[3], &made);
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
